import time

import pytest

from library.errors import UserError
from library.training.clock import iso_date, now, session_id, stamp


def test_time_can_be_fixed(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert now() == 1700000000.0
    assert iso_date(now()) == "2023-11-14T22:13:20"
    assert stamp(now()) == "20231114221320"
    assert session_id(1) == session_id(1) != session_id(2)


def test_time_is_that_of_the_machine(monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert abs(now() - time.time()) < 5
    assert stamp(0) == time.strftime("%Y%m%d%H%M%S", time.localtime(0))
    assert 0 <= session_id(1) < 2**32
    assert session_id(1) != session_id(1)


@pytest.mark.parametrize("given", ["yesterday", "", "99999999999999", "9" * 400, "-99999999999999"])
def test_a_wrong_fixed_time_is_the_users(monkeypatch, given):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", given)
    with pytest.raises(UserError, match=f"'{given}' is no time"):
        now()
