"""Two processes of one training, forked where PyTorch is imported already. They meet at a store of the test, so no port is guessed."""
import os
import traceback

import torch
from kernels import CONTEXT
from torch.distributed import TCPStore, destroy_process_group, is_initialized

from semiseg_nb.checks import pair_environment


def work(function, arguments, environment, ends):
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        function(*arguments)
        if is_initialized(): destroy_process_group()
        ends.put("")
    except BaseException:
        ends.put(traceback.format_exc())


def run_pair(function, *arguments):
    "Call a function of a test's module in two processes; what it leaves, it writes to files"
    store, ends = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), CONTEXT.Queue()
    pair = [CONTEXT.Process(target=work, args=(function, arguments, pair_environment(rank, store.port), ends), daemon=True) for rank in (0, 1)]
    for process in pair: process.start()
    try:
        for _ in pair:
            end = ends.get(timeout=300)
            assert not end, end
    finally:
        for process in pair: process.kill()
