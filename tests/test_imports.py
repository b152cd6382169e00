"""What must stay light stays light: a gateway or an agent never pays for torch."""

import subprocess
import sys

import pytest

WITHOUT_TORCH = [
    "hscr.records",
    "hscr.config",
    "hscr.errors",
    "hscr.engine",
    "hscr.imaging.decode",
    "hscr.store.store",
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
    "workers.evaluate",
    "workers.finetune",
    "workers.generate",
    "workers.release",
    "workers.schedule",
    "workers.score",
    "workers.sweep",
]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_imports_without_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["hscr.store.store", "hscr.evaluate.gate", "hscr.contrast.generate"])
def test_the_domain_imports_no_process(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{n.split('.')[0] for n in sys.modules}} & {{'service', 'workers', 'celery'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
