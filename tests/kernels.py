"""Kernels for the notebook tests, forked from a process that has imported PyTorch already: a third of a short run would be imports otherwise."""
import gc
import multiprocessing
import os
import signal
import sys

from jupyter_client.provisioning import local_provisioner

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "torchvision", "timm", "segmentation_models_pytorch", "scipy.stats", "ipykernel.kernelapp", "ipykernel.ipkernel",
                                "ipywidgets", "matplotlib.pyplot", "semiseg_nb.command", "semiseg_nb.leaderboard", "semiseg_nb.viz"])


def run_kernel(arguments, cwd, env, ready):
    "What `python -m ipykernel_launcher` does, in a process of its own"
    gc.freeze()  # what is imported already is no garbage: not to be searched again and again
    os.setsid()  # a group of its own, which is stopped as a whole
    ready.set()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["ipykernel_launcher", *arguments]
    import matplotlib
    from ipykernel.kernelapp import launch_new_instance
    matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"  # pyplot is imported already
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    ConstrainedLayoutEngine.execute = lambda self, fig: None  # to place titles finely costs as much as to draw the picture, and nobody looks
    launch_new_instance(argv=[*arguments, "--InlineBackend.print_figure_kwargs={}"])


class Forked:
    "What a provisioner wants to know of a process"
    stdin = stdout = stderr = None

    def __init__(self, process): self.process, self.pid = process, process.pid
    def poll(self): return self.process.exitcode
    def send_signal(self, number): os.kill(self.pid, number)
    def terminate(self): self.send_signal(signal.SIGTERM)
    def kill(self): self.send_signal(signal.SIGKILL)

    def wait(self):
        self.process.join()
        return self.process.exitcode


def launch(cmd, cwd=None, env=None, **_):
    "In place of `jupyter_client.launcher.launch_kernel`"
    ready = CONTEXT.Event()
    process = CONTEXT.Process(target=run_kernel, args=(cmd[cmd.index("ipykernel_launcher") + 1:], cwd or os.getcwd(), dict(env or os.environ), ready), daemon=True)
    process.start()
    assert ready.wait(120), "the kernel has not started"
    return Forked(process)


def fork_kernels(): local_provisioner.launch_kernel = launch
