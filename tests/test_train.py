"""What train.py does before there is a run."""

from pathlib import Path

import train


def test_without_a_home_no_programs_are_kept_and_a_line_says_so(monkeypatch, capsys):
    def home():
        raise RuntimeError("Could not determine home directory.")

    assert train._default_cache().endswith("/cuttlefish_jax/compiled")
    monkeypatch.setattr(Path, "home", home)
    assert train._default_cache().endswith("/cuttlefish_jax/compiled"), "XDG_CACHE_HOME is enough"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert train._default_cache() == ""
    said = capsys.readouterr().err
    assert said.startswith("warning: compiled programs are not kept") and said.count("\n") == 1
