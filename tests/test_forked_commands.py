"""Commands that tests fork are what a shell would start, and they are forked."""

import pytest
import sklearn.datasets  # noqa: F401  # sets variables

from tests.support.commands import environment, run, server, start

COMMANDS = [("--version",), ("inspect", "missing"), ("profile", "list", "--json"), ("prune", "--bogus")]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_forked_command_ends_and_says_what_a_started_one_does(arguments: tuple[str, ...]) -> None:
    assert server().serves(environment())
    assert run(*arguments) == start(*arguments)


def test_where_imports_could_differ_a_command_is_started() -> None:
    assert server().serves(environment({"CAHFP_DEBUG": "1"}))
    assert not server().serves(environment({"PYTHONPATH": "elsewhere"}))
