"""Every method of the package, and every stage of a recipe, keeps the promises that `check_method` names; and `check_method` finds what breaks them."""
import importlib
import inspect
import pkgutil

import pytest
import torch

import semiseg_nb
from semiseg_nb.catalogue import load_across, load_task
from semiseg_nb.cct import CCT
from semiseg_nb.checks import CHECKS, Bench, check_method, check_processes
from semiseg_nb.core import defaults_of
from semiseg_nb.cyclegan import CycleGAN, PairSegmenter
from semiseg_nb.engine import Method
from semiseg_nb.experiment import methods
from semiseg_nb.inversion import SemanticEncoder
from semiseg_nb.models import build_model
from semiseg_nb.phases import Pairs, Phase2, Phase3, Renderer, StyleEncoder, patch_critic
from semiseg_nb.semanticgan import SemanticGAN
from semiseg_nb.stylegan2 import StyleGAN2
from semiseg_nb.supervised import Supervised
from semiseg_nb.tags import CCTWeak, Tagger
from semiseg_nb.uda import UDA

SMALL = dict(n_labelled=6, size=32, n_unlabelled=12)
TASKS = {
    "scenes": lambda: load_task("scenes", **SMALL, weak_tags=True),
    "portraits": lambda: load_task("portraits", **SMALL),
    "across": lambda: load_across("scenes", None, 6, 0, 32, "inverted", 1.0, None, None)[1],
}
PORTRAITS = (SemanticGAN, SemanticEncoder, StyleGAN2)


def weak(cls, net, task, **given):
    pseudo = torch.zeros(len(task.unlabelled), *task.unlabelled.size, dtype=torch.uint8)
    return cls(net, task, **{"pseudo": pseudo} | given)


def encoder(cls, net, task, **given): return cls(SemanticGAN(task), task, **given)


def second(cls, net, task, **given):
    return cls(task, build_model("unet", task.n_classes, width=4), **{"D_m": patch_critic(3 + task.n_classes)} | given)


def third(cls, net, task, **given):
    pairs = task.labelled.images[:6].clone(), task.labelled.masks[:6].clone()
    parts = dict(G2=Renderer(task.n_classes, 8), E_s=StyleEncoder(8), D_m=patch_critic(3 + task.n_classes), S=Pairs(*pairs), S2=Pairs(*pairs))
    return cls(net, task, **parts | given)


MAKE = {CCTWeak: weak, SemanticEncoder: encoder, Phase2: second, Phase3: third}


def classes():
    "Every method class of the package that can be trained"
    found = []
    for module in pkgutil.iter_modules(semiseg_nb.__path__, "semiseg_nb."):
        if module.name.endswith(("__main__", ".failures")): continue  # those break promises on purpose
        for thing in vars(importlib.import_module(module.name)).values():
            own = inspect.isclass(thing) and thing.__module__ == module.name and issubclass(thing, Method)
            if own and "updates" in dir(thing) and thing.updates is not Method.updates: found.append(thing)
    return found


LOW = {"threshold": 0.2}  # lets the losses on unlabelled images through
SHARED = [cls for cls in classes() if cls.name and cls not in MAKE]  # what needs a network and a task, or a task
made = {}


def given(cls, **more): return {k: v for k, v in LOW.items() if k in defaults_of(cls)} | more


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("cls", [cls for cls in classes() if cls.title], ids=lambda c: c.__name__)
def test_every_method_keeps_its_promises(cls, check):
    name = "portraits" if cls in PORTRAITS else "across" if cls in (CycleGAN, PairSegmenter) else "scenes"
    made.setdefault(name, None)
    made[name] = made[name] or TASKS[name]()
    check(Bench(cls, made[name], given(cls), MAKE.get(cls)))


def test_no_method_is_forgotten():
    alone = {what for what in methods().values() if inspect.isclass(what)}
    assert alone <= set(classes()) and {CCTWeak, CycleGAN, Phase2, Phase3, SemanticGAN, SemanticEncoder, StyleGAN2, Tagger} <= set(classes())
    assert not [cls.__name__ for cls in alone if cls is not Supervised and cls.baseline is None], "a method says when it is the baseline"


@pytest.mark.slow
def test_two_processes_train_every_method(): check_processes(*SHARED)


# ---------------------------------------------------------------- and what breaks a promise is found

class Drawing(UDA):
    "Weight 0 is no longer the baseline: the views are others"
    name = "drawing"
    def updates(self, lab, unl, clock):
        lab = lab | {"image": lab["image"].flip(3), "mask": lab["mask"].flip(2)}
        yield from super().updates(lab, unl, clock)


class Peeking(UDA):
    name = "peeking"
    def updates(self, lab, unl, clock):
        unl.get("mask")
        yield from super().updates(lab, unl, clock)


class Remembering(UDA):
    "State that no checkpoint holds"
    name, seen = "remembering", 0
    def updates(self, lab, unl, clock):
        self.seen += 1
        for name, losses in ((n, l) for n, l, *_ in super().updates(lab, unl, clock)): yield name, {k: v * self.seen for k, v in losses.items()}


class Rewriting(UDA):
    name = "rewriting"
    def __init__(self, net, task, **settings):
        super().__init__(net, task, **settings)
        self.weight = 2 * self.weight


class Trusting(Supervised):
    "No range is checked"
    name = "trusting"
    def __init__(self, net, task, *, share: float = 0.5, **labelled):
        super().__init__(net, task, **labelled)
        self.share = share


class Thawing(Supervised):
    "Moves what is frozen"
    name = "thawing"
    def updates(self, lab, unl, clock):
        yield from super().updates(lab, unl, clock)
        with torch.no_grad():
            for p in self.net.parameters(): p.mul_(0.99)


class Local(Supervised):
    "A lambda cannot be pickled"
    name = "local"
    def __init__(self, net, task, **labelled):
        super().__init__(net, task, **labelled)
        self.twice = lambda x: 2 * x


@pytest.mark.parametrize("cls, check, said", [
    (Drawing, "baseline", "does not take the steps of the supervised baseline"), (Peeking, "unlabelled", "mask of an unlabelled image was looked for"),
    (Remembering, "resume", "ends with other weights"), (Rewriting, "names", "'weight' comes back as"), (Trusting, "ranges", "accepts share=nan"),
    (Thawing, "frozen", "moves parameters that are frozen"), (Local, "finite_and_copy", "pickle")], ids=lambda v: getattr(v, "__name__", ""))
def test_a_broken_promise_is_named(cls, check, said):
    made.setdefault("scenes", TASKS["scenes"]())
    with pytest.raises(Exception, match=said):
        {c.__name__: c for c in CHECKS}[f"check_{check}"](Bench(cls, made["scenes"], given(cls)))


def test_one_call_makes_all_checks():
    check_method(CCT, made.setdefault("scenes", TASKS["scenes"]()), processes=False)
