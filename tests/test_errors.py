"""What a command says to people: warnings as sentences, once."""

import warnings

import pytest

from harmonica.errors import HarmonicaError, HarmonicaWarning, run_command


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_process_says_what_only_it_may_have_met(rank, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", rank)
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)

    @run_command
    def program():
        raise HarmonicaError("mind the gap")

    with pytest.raises(SystemExit) as end:
        program()
    assert end.value.code == 2 and capsys.readouterr().err == "error: mind the gap\n"
    assert len(waited) == int(rank)


@pytest.mark.parametrize(("rank", "said"), [("0", "warning: mind the gap\n"), ("1", "")])
def test_a_warning_is_a_sentence_said_once_by_the_main_process(rank, said, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)

    @run_command
    def program():
        for _ in range(3):
            warnings.warn("mind the gap", HarmonicaWarning, stacklevel=1)

    program()
    assert capsys.readouterr().err == said
    program()  # another command of the same process says it again
    assert capsys.readouterr().err == said


def test_warnings_of_others_are_left_alone():
    @run_command
    def program():
        warnings.warn("theirs", FutureWarning, stacklevel=1)

    with pytest.warns(FutureWarning, match="theirs"):
        program()
