"""A whole run on two hosts, through the profile and the switch."""

import json

import pytest
from host_tools import run_on_two_hosts

from cuttlefish_jax.profiling.kernel_profile import KernelProfile

_RUN = """
    import json, sys
    from configs import quickstart
    from cuttlefish_jax.training import loop

    got, own = [], loop.get_profile

    def get_profile(*args):
        got.append(own(*args))
        return got[-1]

    loop.get_profile = get_profile
    config = quickstart.get_config()
    config.update_from_flattened_dict(json.loads(sys.argv[2]))
    summary = loop.run(config, sys.argv[1])
    print(json.dumps({"summary": summary, "profile": got[0].to_json()}))
"""
SETTINGS = {
    "epochs": 3,
    "batch_size": 16,
    "model.width": 8,
    "model.stage_sizes": (1, 1),
    "data.train_examples": 64,
    "schedule.warmup_epochs": 0.0,
    "switch.criterion": "at_epoch",
    "switch.epoch": 1,
    "plan.keep": (),
    "plan.factorize": (),
    "plan.rank_rule": "rank_ratio",
    # Layers as small as these do not get faster: what counts here is that both hosts decide alike.
    "profile.enabled": True,
    "profile.min_speedup": 0.0,
    "profile.min_layer_speedup": 0.0,
}


@pytest.mark.slow
def test_both_hosts_take_the_first_ones_profile_and_finish_the_run(tmp_path):
    workdir = tmp_path / "run"
    outputs = run_on_two_hosts(_RUN, workdir, json.dumps(SETTINGS))
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)

    # Times that each had measured by itself would differ.
    written = KernelProfile.from_json((workdir / "profile.json").read_text())
    assert KernelProfile.from_json(first["profile"]) == written
    assert KernelProfile.from_json(second["profile"]) == written

    assert first["summary"]["switch_epoch"] == 1 and first["summary"]["ranks"]
    assert first["summary"]["ranks"] == second["summary"]["ranks"]
    assert first["summary"]["test_accuracy"] == second["summary"]["test_accuracy"]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["phase"] for line in lines] == ["full_rank", "low_rank", "low_rank"]
