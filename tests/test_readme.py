"""The README's Python runs as it stands, and does what the README says."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_loop_of_the_readme_switches_and_learns():
    own_loop, cuttlefish = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(cuttlefish.strip().splitlines()) <= 15
    names: dict = {}
    exec(compile(own_loop + cuttlefish, str(README), "exec"), names)
    assert names["plan"] is not None, "the ranks did not converge"
    assert names["plan"].num_params < names["plan"].num_params_full
    assert names["losses"][-1] < 0.05
    merged = names["model"].apply({"params": names["params"]}, names["x"])
    low = names["state"].apply_fn({"params": names["state"].params}, names["x"])
    assert abs(merged - low).max() < 1e-4
