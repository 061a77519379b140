"""Client partitions are partitions, and depend on the seed alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cahfp_cli.errors import InputError
from cahfp_cli.federation.partition import LEAST_SAMPLES, Partition, parse_partition, split_clients

pytestmark = pytest.mark.quick

KINDS = st.sampled_from(["iid", "dirichlet(0.3)", "dirichlet(5)", "classes(2)", "classes(3)"])


@settings(max_examples=60, deadline=None)
@given(kind=KINDS, clients=st.integers(4, 9), seed=st.integers(0, 2**31), draw=st.integers(0, 99))
def test_every_sample_has_one_client_and_every_client_enough(kind: str, clients: int, seed: int, draw: int) -> None:
    labels = np.random.default_rng(draw).permutation(np.repeat(np.arange(8), 60))
    shares = split_clients(parse_partition(kind), labels, clients, seed)
    assert len(shares) == clients and min(map(len, shares)) >= LEAST_SAMPLES
    assert (np.sort(np.concatenate(shares)) == np.arange(len(labels))).all()
    assert all((np.diff(share) > 0).all() for share in shares)
    again = split_clients(parse_partition(kind), labels, clients, seed)
    assert all(np.array_equal(left, right) for left, right in zip(shares, again, strict=True))


def test_a_client_of_classes_2_has_two_classes() -> None:
    labels = np.repeat(np.arange(10), 50)
    shares = split_clients(parse_partition("classes(2)"), labels, 10, seed=3)
    assert [len(np.unique(labels[share])) for share in shares] == [2] * 10


def test_clients_are_less_alike_with_a_smaller_alpha() -> None:
    labels = np.repeat(np.arange(10), 500)

    def unlike(kind: str) -> float:
        shares = split_clients(parse_partition(kind), labels, 10, seed=0)
        counts = np.array([np.bincount(labels[share], minlength=10) / len(share) for share in shares])
        return float(np.abs(counts - 0.1).sum(axis=1).mean())

    assert unlike("dirichlet(0.1)") > 2 * unlike("dirichlet(1)") > 2 * unlike("iid")


def test_by_column_has_one_client_for_each_user() -> None:
    users = np.array(["eve", "bob", "eve", "ann"] * 10)
    shares = split_clients(Partition("by-column", column="user"), np.zeros(40, np.int64), 3, 0, users)
    assert [set(users[share]) for share in shares] == [{"ann"}, {"bob"}, {"eve"}]


@pytest.mark.parametrize(
    ("kind", "clients", "says"),
    [
        ("iid", 200, "too few"),
        ("classes(11)", 5, "only 10 classes"),
        ("classes(1)", 5, "cannot cover"),
        ("by-column(user)", 5, "no column 'user'"),
    ],
)
def test_what_cannot_be_split_is_refused(kind: str, clients: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        split_clients(parse_partition(kind), np.arange(100) % 10, clients, 0)


@pytest.mark.parametrize(
    "text", ["", "iid()", "dirichlet", "dirichlet(0)", "dirichlet(nan)", "classes(0)", "classes(x)"]
)
def test_a_partition_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="partition"):
        parse_partition(text)
