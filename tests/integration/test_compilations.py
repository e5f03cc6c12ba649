"""Each phase compiles its programs once, by the end of its first epoch, and so does a run that is resumed."""

import contextlib
import re

import jax
import pytest

from cuttlefish_jax.training import loop

pytestmark = pytest.mark.slow


@pytest.fixture
def compiled(monkeypatch, caplog):
    """A function that runs: ``[(epoch, program), ...]`` in this thread, and the programs of other threads."""
    epochs, stops = [], []
    take_steps = loop._Run._take_steps

    def noted(self, epoch):
        epochs.append((len(caplog.records), epoch))
        if epoch == stops[-1]:
            raise KeyboardInterrupt
        take_steps(self, epoch)

    monkeypatch.setattr(loop._Run, "_take_steps", noted)

    def run(config, workdir, stop=None):
        stops.append(stop)
        epochs.clear()
        caplog.clear()
        jax.config.update("jax_log_compiles", True)  # the context manager's are this thread's alone
        try:
            with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
                loop.run(config, workdir)
        finally:
            jax.config.update("jax_log_compiles", False)
        here, others = [], []
        for index, record in enumerate(caplog.records):
            if found := re.match(r"Finished XLA compilation of (\S+) in", record.getMessage()):
                epoch = max((epoch for start, epoch in epochs if start <= index), default=None)
                if record.threadName == "MainThread":
                    here.append((epoch, found[1]))
                else:
                    others.append(found[1])
        return here, others

    return run


def test_nothing_is_compiled_after_the_first_epoch_of_a_phase(tiny_config, tmp_path, compiled):
    # The rule gives the same ranks on all days, so that what is compiled ahead is what is needed.
    config = tiny_config(
        epochs=7, **{"switch.epoch": 3, "plan.rank_rule": "rank_ratio", "optimizer.ema": 0.9}
    )
    here, others = compiled(config, tmp_path / "ahead")
    assert {epoch for epoch, _ in here} == {None, 0}, here
    # The step, the evaluation of two splits, the change of the state.
    assert len(others) == 4, others

    # Without that, the second phase compiles at the switch, and not again; a resumed run in its first epoch.
    config.switch.compile_ahead = False
    here, others = compiled(config, tmp_path / "there", stop=5)
    assert {epoch for epoch, _ in here} == {None, 0, 2}, here  # 2: behind the steps of that epoch
    here, others = compiled(config, tmp_path / "there")
    assert {epoch for epoch, _ in here} == {None, 5}, here
    assert others == []
