"python -m semiseg_nb: the command `semiseg`"
from .command import main

main()
