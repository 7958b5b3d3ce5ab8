"""Signals during a run: the first one asks, the second one ends, and nothing of it stays behind."""

import os
import signal
import threading

import pytest

from lora_adapters.runs.stopping import InterruptedRunError, StopSignal

NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def handlers():
    """Tests may not change what pytest does at Ctrl-C."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield before
    now = {number: signal.getsignal(number) for number in NUMBERS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert now == before


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_noted_and_the_second_ends(number, capsys):
    stop = StopSignal()
    with pytest.raises(KeyboardInterrupt), stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested is number
        os.kill(os.getpid(), number)
    out, err = capsys.readouterr()
    assert (out, err.count("once more stops at once")) == ("", 1)


def test_two_different_signals_are_two():
    stop = StopSignal()
    with pytest.raises(KeyboardInterrupt), stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested is signal.SIGTERM


def test_the_handlers_are_put_back_after_an_error(handlers):
    with pytest.raises(ZeroDivisionError), StopSignal():
        assert signal.getsignal(signal.SIGTERM) != handlers[signal.SIGTERM]
        1 / 0  # noqa: B018
    assert {number: signal.getsignal(number) for number in NUMBERS} == handlers


def test_a_handler_of_the_callers_own_is_put_back(handlers):
    seen = []
    own = lambda number, frame: seen.append(number)  # noqa: E731
    signal.signal(signal.SIGTERM, own)
    with StopSignal():
        pass
    assert signal.getsignal(signal.SIGTERM) is own
    os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, handlers[signal.SIGTERM])


def test_in_another_thread_it_watches_nothing(handlers):
    """Python lets the main thread alone handle signals; a run in another one must still work."""
    seen = []

    def run():
        with StopSignal() as stop:
            seen.append({number: signal.getsignal(number) for number in NUMBERS})
        seen.append(stop.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [handlers, None]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_where_nothing_is_to_save_the_first_signal_ends_it(number, status, capsys):
    stop = StopSignal()
    with stop, pytest.raises(InterruptedRunError) as caught:
        with stop.at_once("Nothing was trained yet."):
            try:
                os.kill(os.getpid(), number)
            except Exception:  # a library that goes on whatever happens
                pytest.fail("swallowed")
            pytest.fail("went on")
    assert str(caught.value) == f"Stopped by {number.name}. Nothing was trained yet."
    assert caught.value.exit_status == status
    assert capsys.readouterr().err == ""


def test_a_signal_that_came_before_such_a_stage_keeps_it_from_beginning():
    stop, began = StopSignal(), False
    with stop, pytest.raises(InterruptedRunError, match="Not measured"):
        os.kill(os.getpid(), signal.SIGINT)
        with stop.at_once("Not measured."):
            began = True
    assert not began


def test_after_such_a_stage_the_first_signal_asks_again():
    stop = StopSignal()
    with stop:
        with stop.at_once("Nothing was trained yet."):
            pass
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested is signal.SIGINT


def test_an_interrupt_that_is_no_signal_of_ours_goes_through():
    with pytest.raises(KeyboardInterrupt), StopSignal().at_once("..."):
        raise KeyboardInterrupt
