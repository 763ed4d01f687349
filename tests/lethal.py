"""Ways for a worker to die of one prompt: hooks that a worker's Python runs before anything else.

Each returns what the environment needs for it.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.models import tiny_tokenizer
from tests.processes import ROOT

POISON = "~"

_HOOK = """
import importlib.abc, importlib.util, os, signal, sys, time

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), arm(module))
        return spec

sys.meta_path.insert(0, Hook())
"""
_ENGINE = """
def arm(module):
    engine = module.Engine
    add, step = engine.add, engine.step
    doomed, steps = set(), [0]
    def adding(self, job_id, prompt):
        if {token} in prompt.tokens:
            doomed.add(job_id)
        add(self, job_id, prompt)
    def stepping(self):
        events = step(self)
        steps[0] += bool(doomed & set(self.running))
        if steps[0] > 2:
            time.sleep(1)  # or the worker may not have written down yet how far the job came, and tries it again
            {death}
        return events
    engine.add, engine.step = adding, stepping
"""
_TOKENIZER = """
def arm(module):
    prepare = module.prepare
    def preparing(job, *others):
        if {poison!r} in (job.prompt or ""):
            {death}
        return prepare(job, *others)
    module.prepare = preparing
"""

_ANY_PROMPT = """
def arm(module):
    def rendering(*_):
        {death}
    module._render = rendering
"""


def of_decoding(directory: Path, death: str) -> dict[str, str]:
    """End the process by `death`, a statement, soon after it decodes a prompt with `POISON` in it."""
    (token,) = tiny_tokenizer().encode(POISON)
    return _hook(directory, "worker.engine", _ENGINE.format(token=token, death=death))


def of_tokenising(directory: Path, death: str) -> dict[str, str]:
    """End the process by `death` when it prepares a prompt with `POISON` in it."""
    return _hook(directory, "worker.window", _TOKENIZER.format(poison=POISON, death=death))


def of_any_chat(directory: Path, death: str) -> dict[str, str]:
    """End the process by `death` when it prepares any messages at all."""
    return _hook(directory, "worker.prepare", _ANY_PROMPT.format(death=death))


def _hook(directory: Path, module: str, arm: str) -> dict[str, str]:
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(_HOOK.format(module=module) + arm)
    return {"PYTHONPATH": f"{directory}{os.pathsep}{ROOT}"}
