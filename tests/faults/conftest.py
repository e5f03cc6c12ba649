"""One run that nothing happens to, for all tests of this folder."""

import pytest
from trainer import Trainer, environment


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """A finished run; what it compiled is there for the others."""
    folder = tmp_path_factory.mktemp("faults")
    trainer = Trainer(folder / "unbroken", environment(folder / "cache"))
    done = trainer.finish()
    assert done.returncode == 0, done.stderr
    assert any((folder / "cache").iterdir()), "the cache of the environment was not used"
    return trainer


@pytest.fixture
def broken(unbroken, tmp_path):
    """The same run, not started yet, in a folder of a name that is not easy."""
    return Trainer(tmp_path / "ein Lauf über 試験", unbroken.environment)
