"""What must stay light stays light: a gateway or an agent never pays for torch."""

import subprocess
import sys

import pytest

WITHOUT_TORCH = [
    "hscr.records",
    "hscr.config",
    "hscr.errors",
    "hscr.engine",
    "hscr.serving",
    "hscr.imaging.decode",
    "hscr.store.store",
    "hscr.rows.source",
    "hscr.runs.finish",
    "hscr.runs.shards",
    "hscr.store.export.read",
    "hscr.store.export.write",
    "hscr.evaluate.gate",
    "hscr.evaluate.run",
    "hscr.evaluate.suites",
    "hscr.models.digest",
    "hscr.models.phantom.data",
    "hscr.cli",
    "service.app",
    "workers.contract",
    "workers.app",
    "workers.outbox",
    "workers.agent",
    "workers.canary",
    "workers.evaluate",
    "workers.finetune",
    "workers.generate",
    "workers.release",
    "workers.schedule",
    "workers.score",
    "workers.sweep",
]


_CODE = """
import importlib, sys
for module in sys.argv[2:]:
    importlib.import_module(module)
    found = sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[1].split()))
    assert not found, f"{module} imports {found}"
"""


def check(modules: list[str], forbidden: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CODE, forbidden, *modules], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_everything_but_the_model_code_imports_without_torch() -> None:
    check(WITHOUT_TORCH, "torch transformers peft")


def test_the_domain_imports_no_process() -> None:
    check(["hscr.store.store", "hscr.evaluate.gate", "hscr.contrast.generate"], "service workers celery")


def test_the_check_itself_notices_torch() -> None:
    with pytest.raises(AssertionError, match="imports"):
        check(["hscr.models.vlm"], "torch")


def test_commands_start_without_what_reads_images() -> None:
    check(["hscr.cli.app"], "numpy pydicom PIL pyarrow sqlalchemy")
