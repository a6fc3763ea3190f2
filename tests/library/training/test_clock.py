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


def test_a_wrong_fixed_time_is_the_users(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UserError, match="'yesterday' is no time"):
        now()
