"""Mistakes made on purpose: a replacement of text in a copy of the kernels' files, which the public function then runs.

That the text is there is asserted, so no refactoring makes a mistake a mistake no more without a word.
"""

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import dwconv_kernels
from dwconv_kernels import devices, dtypes, gluon_emulator, interpreter, registration, runtime

_numbers = itertools.count()


class Mistake(NamedTuple):
    what: str
    file: str
    right: str
    wrong: str
    proof: str
    everywhere: bool = False


def _poisoned(make: Callable) -> Callable:
    """What is left out shows: memory that nobody has written may hold what another proof has, which was right."""

    def poisoned(*args, **kwargs):
        made = make(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    return poisoned


def running_copies(
    family: str, files: Sequence[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Mistake | None], None]]:
    """For a fixture: yields what makes the public function run a copy of ``files``, with a mistake in it or without."""

    for function in ("empty", "empty_strided", "empty_like"):
        monkeypatch.setattr(torch, function, _poisoned(getattr(torch, function)))

    def run(mistake: Mistake | None) -> None:
        name = f"mutant{next(_numbers)}"
        for file in files:
            text = (Path(dwconv_kernels.__file__).parent / file).read_text()
            if mistake is not None and file == mistake.file:
                count = text.count(mistake.right)
                assert count == 1 or (count > 1 and mistake.everywhere), f"{count} times in {file}: {mistake.right}"
                text = text.replace(mistake.right, mistake.wrong)
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_text(text)
        monkeypatch.syspath_prepend(folder)
        # What holds state or registers operators is there once.
        for module in (runtime, registration, devices, dtypes, interpreter, gluon_emulator):
            monkeypatch.setitem(sys.modules, module.__name__.replace("dwconv_kernels", name), module)
        launch = importlib.import_module(f"{name}.{family}.launch")
        monkeypatch.setattr(runtime, "launchers", lambda _: launch)

    yield run
    for module in [module for module in sys.modules if module.startswith("mutant")]:
        del sys.modules[module]
