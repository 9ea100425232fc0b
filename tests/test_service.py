"""The retriever service: order, results, failures, cancelling and its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from memlong_vllm.retriever import service
from tests.service_client import DEADLINE_S, DIMENSION, BagOfWords, Client, text_vector


@pytest.fixture
def make_client() -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def make(**options: object) -> Client:
        clients.append(Client(**options))
        return clients[-1]

    yield make
    for client in clients:
        client.release()
        client.service.shutdown()


MakeClient = Callable[..., Client]


def test_every_span_gets_the_vector_of_its_text(make_client: MakeClient) -> None:
    client = make_client()
    client.submit("a", (1, 2, 3), (4, 5), (1, 1, 0))
    client.collect(a=3)
    assert set(client.results["a"]) == {(0, 1), (1, 2), (2, 3)}
    np.testing.assert_array_equal(client.results["a"][0, 1], text_vector(1, 2, 3))
    np.testing.assert_array_equal(client.results["a"][1, 2], text_vector(4, 5))
    np.testing.assert_array_equal(client.results["a"][2, 3], text_vector(1, 1))
    assert client.results["a"][0, 1].dtype == np.float32
    assert client.failures == {}


def test_results_are_taken_once(make_client: MakeClient) -> None:
    client = make_client()
    client.submit("a", (1,))
    client.collect(a=1)
    assert client.service.take_results("a") == {}
    assert client.service.take_results("unknown") == {}


def test_one_call_embeds_texts_of_several_requests(make_client: MakeClient) -> None:
    client = make_client(batch_size=4)
    client.hold()
    client.submit("a", (1,), (2,))
    client.submit("b", (3,), (4,), (5,))
    client.release()
    client.collect(a=2, b=3)
    assert client.embedder.calls == [["w999"], ["w1", "w2", "w3", "w4"], ["w5"]]
    np.testing.assert_array_equal(client.results["b"][0, 1], text_vector(3))


def test_decoding_requests_go_before_prefills_then_first_come_first(make_client: MakeClient) -> None:
    client = make_client()
    client.hold()
    client.submit("p", (1,), (2,))
    client.submit("q", (3,))
    client.submit("d", (4,), (5,), urgent=True)
    client.release()
    client.collect(p=2, q=1, d=2)
    assert client.texts_embedded == ["w999", "w4", "w5", "w1", "w2", "w3"]


def test_urgent_texts_do_not_starve_the_others(make_client: MakeClient) -> None:
    """However many urgent texts come later, only so many go first."""
    client = make_client()
    client.hold()
    client.submit("p", (1,))
    client.submit("d", *((number,) for number in range(2, 102)), urgent=True)
    client.release()
    client.collect(p=1, d=100)
    overtaking = client.texts_embedded.index("w1") - 1
    assert 0 < overtaking <= service._MAX_OVERTAKEN


def test_what_is_queued_and_what_is_at_work_are_counted(make_client: MakeClient) -> None:
    client = make_client()
    client.hold()
    client.submit("a", (1,), (2,), (3,))
    # What holds the embedder is at work.
    assert (client.service.num_pending(), client.service.num_at_work()) == (3, 1)
    client.release()
    client.collect(a=3)
    assert (client.service.num_pending(), client.service.num_at_work()) == (0, 0)


def test_equal_texts_are_embedded_once_and_are_bitwise_equal(make_client: MakeClient) -> None:
    client = make_client(batch_size=8)
    client.hold()
    client.submit("a", (1, 2), (3,), (1, 0, 2))
    client.submit("b", (1, 2))
    client.release()
    client.collect(a=3, b=1)
    client.submit("c", (3,), (1, 2))
    client.collect(c=2)
    assert sorted(client.texts_embedded) == ["w1 w2", "w3", "w999"]
    equal = [client.results["a"][0, 1], client.results["a"][2, 3], client.results["b"][0, 1], client.results["c"][1, 2]]
    assert len({vector.tobytes() for vector in equal}) == 1


def test_cache_forgets_the_text_used_longest_ago(make_client: MakeClient) -> None:
    client = make_client(cache_size=2)
    client.submit("a", (1,), (2,), (1,), (3,), (1,), (2,))
    client.collect(a=6)
    assert client.texts_embedded == ["w1", "w2", "w3", "w2"]


def test_a_batch_larger_than_the_cache(make_client: MakeClient) -> None:
    client = make_client(batch_size=4, cache_size=1)
    client.hold()
    client.submit("a", (1,), (2,), (3,), (1,))
    client.release()
    client.collect(a=4)
    assert client.embedder.calls[1:] == [["w1", "w2", "w3"]]
    np.testing.assert_array_equal(client.results["a"][3, 4], text_vector(1))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_empty_texts_are_zeros_without_the_embedder(make_client: MakeClient, batch_size: int) -> None:
    client = make_client(batch_size=batch_size, instruction="find: ")
    client.hold()
    client.submit("a", (0, 0), (1,), ())
    client.release()
    client.collect(a=3)
    assert client.texts_embedded == ["find: w999", "find: w1"]
    assert not client.results["a"][0, 1].any()
    assert not client.results["a"][2, 3].any()
    assert client.results["a"][0, 1].shape == (DIMENSION,)
    assert client.results["a"][1, 2].any()


def test_instruction_stands_before_every_text(make_client: MakeClient) -> None:
    client = make_client(instruction="query: ")
    client.submit("a", (1,), (2,))
    client.collect(a=2)
    assert client.texts_embedded == ["query: w1", "query: w2"]
    np.testing.assert_array_equal(client.results["a"][0, 1], BagOfWords.vector("query: w1"))


FAULTS = {
    "raises": (-1, "RuntimeError: cannot embed BAD"),
    "not finite": (-2, "ValueError: the embedder returned a vector that is not finite"),
    "wrong shape": (-3, "ValueError: the embedder returned shape (1, 15) for 1 texts"),
    "cannot be decoded": (-4, "ValueError: no such token"),
}


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_text_fails_only_its_owner(make_client: MakeClient, fault: str, batch_size: int) -> None:
    token_id, reason = FAULTS[fault]
    client = make_client(batch_size=batch_size)
    client.hold()
    client.submit("a", (1,), (2,))
    client.submit("bad", (3,), (token_id, 4))
    client.submit("c", (5,), (6,))
    client.release()
    client.until(lambda: bool(client.failures) and len(client.results["c"]) == 2, "a", "bad", "c")
    assert client.failures == {"bad": reason}
    assert len(client.results["a"]) == 2
    np.testing.assert_array_equal(client.results["c"][1, 2], text_vector(6))
    assert (1, 2) not in client.results["bad"]


def test_a_failure_is_not_remembered(make_client: MakeClient) -> None:
    """Neither the text nor the service is spoiled by it, and each failure is told once."""
    client = make_client()
    client.submit("a", (-1,))
    client.until(lambda: "a" in client.failures, "a")
    assert client.service.take_failures() == {}
    client.submit("b", (-1,))
    client.submit("c", (1,))
    client.until(lambda: "b" in client.failures and len(client.results["c"]) == 1, "c")


def test_cancel_drops_queued_spans_and_results(make_client: MakeClient) -> None:
    client = make_client()
    client.submit("a", (1,))
    client.until(lambda: client.service.num_pending() == 0)
    client.embedder.entered.clear()
    client.hold()
    client.submit("a", (2,), (3,))
    client.submit("b", (4,))
    client.service.cancel("a")
    assert client.service.num_pending() == 1
    client.release()
    client.collect(b=1)
    assert client.service.take_results("a") == {}
    assert client.texts_embedded == ["w1", "w999", "w4"]


def test_cancelling_a_request_whose_text_is_being_embedded(make_client: MakeClient) -> None:
    client = make_client()
    client.embedder.gate.clear()
    client.submit("a", (1,))
    assert client.embedder.entered.wait(DEADLINE_S)
    client.service.cancel("a")
    client.service.cancel("unknown")
    client.submit("b", (2,))
    client.release()
    client.collect(b=1)
    assert client.service.take_results("a") == {}


def test_wait_returns_when_something_finishes(make_client: MakeClient) -> None:
    client = make_client()
    client.hold()

    def wait() -> None:
        # The service needs this lock to note a result, so nothing finishes before wait gives it up.
        with client.service._changed:
            client.release()
            client.service.wait(3600)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(DEADLINE_S)
    assert not waiting.is_alive()


def test_where_no_thread_can_be_started_the_service_embeds_on_its_own(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        client.submit("a", (1,))
        client.collect(a=1)
    client.submit("b", (2,))
    client.collect(b=1)
    assert client.failures == {}
    assert [thread.name for thread in client.embedder.threads] == ["memlong-retriever", "memlong-embedder"]


def test_shutdown_ends_the_thread_and_leaves_the_queue(make_client: MakeClient) -> None:
    client = make_client()
    client.hold()
    client.submit("a", (1,), (2,))
    stopping = threading.Thread(target=client.service.shutdown, daemon=True)
    stopping.start()
    client.until(lambda: client.service._stopping)
    client.release()
    stopping.join(DEADLINE_S)
    assert not stopping.is_alive()
    assert not client.service._thread.is_alive()
    assert client.texts_embedded == ["w999"]
    client.service.shutdown()


def test_a_hanging_embedder_does_not_hold_up_shutdown(make_client: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_SHUTDOWN_TIMEOUT_S", 0.01)
    client = make_client()
    client.hold()
    client.service.shutdown()
    assert client.service._thread.is_alive()
    assert client.service._thread.daemon


def test_threads_of_the_embedder_end_with_the_queue(make_client: MakeClient) -> None:
    """So do the OpenMP threads that belong to them, which would slow the model's down."""
    client = make_client()
    client.hold()
    client.submit("a", (1,), (2,))
    client.release()
    client.collect(a=2)
    first = client.embedder.threads[0]
    assert client.embedder.threads == [first] * 3
    first.join(DEADLINE_S)
    assert not first.is_alive()
    client.submit("b", (3,))
    client.collect(b=1)
    assert client.embedder.threads[3] is not first


def test_nobody_waits_for_an_embedder_that_ended_its_thread(make_client: MakeClient) -> None:
    client = make_client()
    client.submit("a", (-5,), (2,))
    client.until(lambda: "a" in client.failures)
    assert client.failures == {"a": "the retriever's thread ended (SystemExit: over)"}


@pytest.mark.parametrize("error", [OSError("no such CPUs"), SystemExit("no such CPUs")])
def test_nobody_waits_for_a_thread_that_ended(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    go_on = threading.Event()

    def refuse() -> None:
        assert go_on.wait(DEADLINE_S)
        raise error

    monkeypatch.setattr(service, "use_process_cpus", refuse)
    client = make_client()
    client.submit("a", (1,), (2,))
    go_on.set()
    client.until(lambda: "a" in client.failures)
    client.service._thread.join(DEADLINE_S)
    client.submit("b", (3,))
    client.until(lambda: "b" in client.failures)
    assert set(client.failures.values()) == {f"the retriever's thread ended ({type(error).__name__}: no such CPUs)"}
    assert client.service.num_pending() == 0
