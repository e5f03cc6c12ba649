import logging

import numpy as np
import pytest

from cuttlefish_jax.errors import UserError
from cuttlefish_jax.training.data.damage import DamageLog, DataError


def batch(*damaged):
    return {"label": np.zeros(len(damaged), np.int32), "damaged": np.array(damaged, np.int32)}


def test_each_damaged_example_is_named_once(caplog):
    log = DamageLog("n{:03}.JPEG".format, num_examples=5000)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert list(log.take(batch(-1, 7, -1, 7))) == ["label"]
        log.take({"damaged": np.array([[-1, 41], [7, -1]])})  # as it is spread over devices
    assert log.indices == {7, 41}
    assert [record.getMessage() for record in caplog.records] == [
        "n007.JPEG cannot be decoded, and is left out (1 so far of 5000)",
        "n041.JPEG cannot be decoded, and is left out (2 so far of 5000)",
    ]


def test_batches_without_a_report_pass_through():
    log = DamageLog(str, num_examples=10)
    plain = {"label": np.zeros(2, np.int32)}
    assert log.take(plain) is plain
    assert log.indices == set()


def test_names_are_asked_for_only_where_there_is_damage():
    def name_of(index):
        raise AssertionError(f"asked for {index}")

    DamageLog(name_of, num_examples=10).take(batch(-1, -1))


@pytest.mark.parametrize(
    ("num_examples", "options", "allowed"),
    [
        (20_000, {}, 20),  # 0.1 %
        (500, {}, 10),  # at least so many
        (1000, dict(max_share=0.05, least=0), 50),
    ],
)
def test_too_many_damaged_examples_are_a_one_line_error(num_examples, options, allowed):
    log = DamageLog("n{:03}.JPEG".format, num_examples, **options)
    log.take(batch(*range(allowed)))
    log.take(batch(*range(allowed)))  # the same ones again
    with pytest.raises(
        DataError, match=f"^{allowed + 1} of {num_examples} examples cannot be decoded"
    ) as error:
        log.take(batch(0, 499))
    assert isinstance(error.value, UserError)
    assert f"the last of them n499.JPEG; at most {allowed} are put up with" in str(error.value)
    assert "\n" not in str(error.value)
