"""Named memories in the engine: written by one request, read by others, exactly."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from memlong_vllm.memories import store
from tests.engines import Engine, Reference, assert_answer

TINY = 1e-5
BLOCK = 32
CHUNK_BYTES = 16 * 2 * 2 * 32 * 4


def start(
    start_engine: Any, model: Path, memory_dir: Path, memlong: dict[str, Any] | None = None, **options: Any
) -> Engine:
    return start_engine(model, block_size=BLOCK, memlong={"memory_dir": str(memory_dir)} | (memlong or {}), **options)


def ask(engine: Engine, prompt: list[int], salt: str | None = None, **extra_args: Any) -> str:
    return engine.add(prompt, salt=salt, prompt_logprobs=None, max_tokens=12, extra_args=extra_args)


def write(engine: Engine, name: str, text: list[int], salt: str | None = None) -> None:
    """Memorize a text's complete chunks; the token sampled at the end completes none."""
    request = engine.add(text, salt=salt, prompt_logprobs=None, max_tokens=1, extra_args={"memory_write": name})
    assert engine.run()[request].outputs[0].finish_reason == "length"


def why(engine: Engine, request: str) -> str:
    completion = engine.run()[request].outputs[0]
    assert completion.finish_reason == "error"
    return completion.stop_reason


@pytest.mark.parametrize("settings", [{}, {"fusion": "joint", "query_scope": "current"}], ids=["gated", "joint"])
def test_reads_join_the_top_k(
    start_engine: Any, checkpoints: Any, tokens: list[int], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Below and beyond the window, one memory and two, alone and together, prefill cut anywhere."""
    model = checkpoints.memlong(**settings)
    reference = Reference(model)
    engine = start(start_engine, model, tmp_path / "memories", max_num_batched_tokens=100)
    texts = {"first": tokens[2000:2700], "second": tokens[4000:4203]}
    for name, text in texts.items():
        write(engine, name, text)
    made = {name: reference.memorize(text) for name, text in texts.items()}
    cases = [(n, names) for n in (40, 300) for names in (("first",), ("second", "first"), ())]
    prompts = [tokens[100 : 100 + n] for n, _ in cases]
    for _ in range(2):  # The second time from the prefix cache, apart for each set of memories.
        requests = [ask(engine, p, memory_read=list(names)) for p, (_, names) in zip(prompts, cases, strict=True)]
        outputs = engine.run()
        answers = []
        for request, (_, names) in zip(requests, cases, strict=True):
            assert_answer(outputs[request], reference, TINY, [made[name] for name in names])
            answers.append(outputs[request].outputs[0].token_ids)
        assert len({tuple(answer) for answer in answers}) >= 4, "what is read makes a difference"
    assert outputs[requests[3]].num_cached_tokens > 0
    assert any(line.get("named") and line["chunk_ids"] for line in engine.trace()), "own and named chunks in one set"
    engine.assert_empty()


def test_readers_with_settings_of_their_own(
    start_engine: Any, checkpoints: Any, tokens: list[int], tmp_path: Path
) -> None:
    """Less memory and smaller sets than the server's, and several answers to one prompt; with padded heads."""
    shape = {"head_dim": 100}
    engine = start(start_engine, checkpoints.memlong(shape=shape), tmp_path / "memories")
    write(engine, "book", tokens[2000:2700])
    prompt, settings = tokens[100:400], ({}, {"top_k": 1}, {"memory_size": 128}, {"memory_size": 0, "top_k": 1})
    requests = [ask(engine, prompt, memory_read="book", **changed) for changed in settings]
    sampled = engine.add(
        prompt, n=2, temperature=1, prompt_logprobs=None, max_tokens=40, extra_args={"memory_read": "book"}
    )
    outputs = engine.run()
    for request, changed in zip(requests, settings, strict=True):
        reference = Reference(checkpoints.memlong(shape=shape, **changed))
        assert_answer(outputs[request], reference, TINY, [reference.memorize(tokens[2000:2700])])
    assert len({tuple(outputs[request].outputs[0].token_ids) for request in requests}) >= 3
    reference = Reference(checkpoints.memlong(shape=shape))
    named = [reference.memorize(tokens[2000:2700])]
    for index in range(2):
        assert_answer(outputs[sampled], reference, TINY, named, index, greedy=False)
    assert len({tuple(completion.token_ids) for completion in outputs[sampled].outputs}) == 2
    engine.assert_empty()


def test_a_memory_outlives_the_engine_and_grows(
    start_engine: Any, model: Path, reference: Reference, tokens: list[int], tmp_path: Path
) -> None:
    engine = start(start_engine, model, tmp_path / "memories")
    write(engine, "book", tokens[:500])
    engine.shutdown()
    engine = start(start_engine, model, tmp_path / "memories")
    before = ask(engine, tokens[3000:3060], memory_read="book")
    outputs = engine.run()
    write(engine, "book", tokens[1000:1400])
    after = ask(engine, tokens[3000:3060], memory_read="book")
    outputs |= engine.run()
    parts = [reference.memorize(tokens[:500]), reference.memorize(tokens[1000:1400])]
    assert_answer(outputs[before], reference, TINY, parts[:1])
    # Chunks of the second write come after those of the first: the order of two memories.
    assert_answer(outputs[after], reference, TINY, parts)
    assert engine.scheduler._named.named_library.info("default", "book").num_chunks == 500 // 16 + 400 // 16
    engine.assert_empty()


def test_what_was_forgotten_or_shared_or_preempted_is_written_all_the_same(
    start_engine: Any, checkpoints: Any, tokens: list[int], tmp_path: Path
) -> None:
    model = checkpoints.memlong(memory_size=128)
    reference = Reference(model)
    engine = start(start_engine, model, tmp_path / "memories", max_num_batched_tokens=128)
    text = tokens[:600]
    engine.add(text, prompt_logprobs=None, max_tokens=1)
    engine.run()
    again = engine.add(text + tokens[700:800], prompt_logprobs=None, max_tokens=40, extra_args={"memory_write": "all"})

    num_running = 0

    def preempt(step: int) -> None:
        nonlocal num_running
        num_running += bool(engine.scheduler.running)
        if num_running in (1, 20):
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    output = engine.run(preempt)[again]
    assert output.num_cached_tokens > 300
    written = text + tokens[700:800] + list(output.outputs[0].token_ids)[:-1]
    read = ask(engine, tokens[3000:3100], memory_read="all")
    assert_answer(engine.run()[read], reference, TINY, [reference.memorize(written)])
    engine.assert_empty()


def test_many_readers_of_a_memory_larger_than_the_bank(
    start_engine: Any, model: Path, reference: Reference, tokens: list[int], tmp_path: Path
) -> None:
    """Chunks come and go; whatever a set holds is right."""
    slots = 90
    engine = start(
        start_engine, model, tmp_path / "memories", {"bank_gib": slots * CHUNK_BYTES / 2**30}, max_model_len=800,
        max_num_batched_tokens=64,
    )  # fmt: skip
    made = []
    for part in range(3):
        text = tokens[part * 780 : part * 780 + 780]
        write(engine, "large", text)
        made.append(reference.memorize(text))
    generator = random.Random(0)
    requests = []
    for _ in range(14):
        first = generator.randrange(5000, 9000)
        requests.append(ask(engine, tokens[first : first + generator.randrange(30, 260)], memory_read="large"))
    outputs = engine.run(lambda step: engine.scheduler.ledger.check())
    for request in requests:
        assert_answer(outputs[request], reference, TINY, made)
    stats = engine.scheduler.memory_stats()
    assert stats["named_chunks_loaded"] > slots
    assert stats["slot_evictions"] > slots
    engine.assert_empty()


def test_tenants_do_not_meet(start_engine: Any, model: Path, tokens: list[int], tmp_path: Path) -> None:
    engine = start(start_engine, model, tmp_path / "memories")
    write(engine, "diary", tokens[:300], salt="alice")
    for salt in (None, "bob", "alic", "Alice"):
        assert "no memory named 'diary'" in why(engine, ask(engine, tokens[:100], salt=salt, memory_read="diary"))
    write(engine, "diary", tokens[500:900], salt="bob")
    assert engine.scheduler._named.flush(30)
    infos = {s: engine.scheduler._named.named_library.names(t) for s, t in folders(("alice", "bob", None)).items()}
    assert [info.num_chunks for info in infos["alice"]] == [300 // 16]
    assert [info.num_chunks for info in infos["bob"]] == [400 // 16]
    assert infos[None] == []
    engine.assert_empty()


def folders(salts: tuple[str | None, ...]) -> dict[str | None, str]:
    from memlong_vllm.memories.names import tenant_folder

    return {salt: tenant_folder(salt) for salt in salts}


def test_a_request_that_does_not_end_well_writes_nothing(
    start_engine: Any, model: Path, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A worker's thread may write a shard after the request has ended: that file goes a little later.
    monkeypatch.setattr(store, "LATE_WRITE_S", 10.0)
    engine = start(start_engine, model, tmp_path / "memories")
    request = engine.add(tokens[:300], max_tokens=50, extra_args={"memory_write": "half"})
    for _ in range(8):
        engine.step()
    engine.llm.llm_engine.abort_request([request])
    engine.run()
    engine.step()
    assert "no memory named 'half'" in why(engine, ask(engine, tokens[:100], memory_read="half"))
    short = engine.add(tokens[:5], max_tokens=3, extra_args={"memory_write": "short"})
    assert "less than a chunk (16 tokens)" in why(engine, short)
    assert engine.scheduler._named.flush(30)
    deadline = time.monotonic() + 60
    while left := list((tmp_path / "memories").rglob("*.safetensors")):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    engine.assert_empty()


def test_quota(start_engine: Any, model: Path, tokens: list[int], tmp_path: Path) -> None:
    chunk_bytes = CHUNK_BYTES + 4 * 16 + 4 * 384
    settings = {"memory_quota_gib": 30 * chunk_bytes / 2**30, "memory_quota_names": 2}
    engine = start(start_engine, model, tmp_path / "memories", settings)
    write(engine, "one", tokens[:160])
    write(engine, "two", tokens[:160])
    for name, length in (("three", 160), ("two", 400)):
        request = engine.add(tokens[:length], max_tokens=1, extra_args={"memory_write": name})
        reason = why(engine, request)
        assert "quota" in reason
    write(engine, "three", tokens[:160], salt="another tenant")
    engine.assert_empty()


def test_a_memory_of_another_model_is_refused(
    start_engine: Any, model: Path, checkpoints: Any, tokens: list[int], tmp_path: Path
) -> None:
    engine = start(start_engine, model, tmp_path / "memories")
    write(engine, "book", tokens[:300])
    engine.shutdown()
    other = checkpoints.memlong(shape={"rms_norm_eps": 1e-3})
    engine = start(start_engine, other, tmp_path / "memories")
    reason = why(engine, ask(engine, tokens[:100], memory_read="book"))
    assert "does not fit this engine" in reason
    assert "below the memory layer" in reason
    assert engine.generate([tokens[:100]], max_tokens=3)[0].outputs[0].finish_reason == "length"
    engine.shutdown()
    # What lies above the memory layer may differ.
    model = checkpoints.memlong(gates=0.3)
    engine, reference = start(start_engine, model, tmp_path / "memories"), Reference(model)
    read = ask(engine, tokens[:100], memory_read="book")
    assert_answer(engine.run()[read], reference, TINY, [reference.memorize(tokens[:300])])


def test_a_damaged_memory_fails_its_readers_only(
    start_engine: Any, model: Path, tokens: list[int], tmp_path: Path
) -> None:
    engine = start(start_engine, model, tmp_path / "memories")
    write(engine, "book", tokens[:300])
    engine.shutdown()
    shard = next((tmp_path / "memories").rglob("*.rank0of1.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    engine = start(start_engine, model, tmp_path / "memories")
    bad, good = ask(engine, tokens[:100], memory_read="book"), ask(engine, tokens[:100])
    outputs = engine.run()
    assert outputs[bad].outputs[0].finish_reason == "error"
    assert shard.name in outputs[bad].outputs[0].stop_reason
    assert outputs[good].outputs[0].finish_reason == "length"
    engine.assert_empty()


def test_a_writer_whose_forgotten_chunks_fill_the_bank_is_admitted(
    start_engine: Any, checkpoints: Any, tokens: list[int], tmp_path: Path
) -> None:
    """Taking a prefix over would hold more slots than there are, so it is computed again."""
    model = checkpoints.memlong(memory_size=128)
    slots = 8 + 9 + 20
    engine = start(
        start_engine, model, tmp_path / "memories", {"bank_gib": slots * CHUNK_BYTES / 2**30},
        max_num_batched_tokens=128, max_model_len=640,
    )  # fmt: skip
    text = tokens[:560]
    engine.add(text, prompt_logprobs=None, max_tokens=1)
    engine.run()
    write(engine, "all", text)
    assert engine.scheduler._named.flush(60)
    assert engine.scheduler._named.named_library.info("default", "all").num_chunks == 560 // 16
    engine.assert_empty()


def test_others_admitted_beside_a_writer_that_takes_over_forgotten_chunks(
    start_engine: Any, checkpoints: Any, tokens: list[int], tmp_path: Path
) -> None:
    """For one step it holds more than it may need; what it needs next is counted all the same."""
    model = checkpoints.memlong(memory_size=128)
    engine = start(
        start_engine, model, tmp_path / "memories", {"bank_gib": 45 * CHUNK_BYTES / 2**30},
        max_num_batched_tokens=256, max_model_len=800, max_num_seqs=16,
    )  # fmt: skip
    engine.add(tokens[:430], prompt_logprobs=None, max_tokens=1)
    engine.run()
    writer = engine.add(
        tokens[:416] + tokens[600:840], prompt_logprobs=None, max_tokens=4, extra_args={"memory_write": "all"}
    )
    others = [engine.add([token], prompt_logprobs=None, max_tokens=4) for token in tokens[:11]]
    outputs = engine.run(lambda step: engine.scheduler.ledger.check())
    assert all(outputs[request].outputs[0].finish_reason == "length" for request in [writer, *others])
    engine.assert_empty()


def test_files_lost_while_a_memory_is_open_end_its_readers_and_nothing_else(
    start_engine: Any, model: Path, reference: Reference, tokens: list[int], tmp_path: Path
) -> None:
    engine = start(start_engine, model, tmp_path / "memories")
    write(engine, "book", tokens[:500])
    keep = ask(engine, tokens[3000:3100], memory_read="book")
    first = engine.run()[keep]
    engine.scheduler.ledger.pool.clear()
    request = ask(engine, tokens[3200:3300], memory_read="book")
    while not engine.scheduler._memories[engine.scheduler.waiting.peek_request().request_id].is_addressed:
        engine.step()
    files = list((tmp_path / "memories").rglob("*rank0of1*"))
    for file in files:
        file.rename(file.with_suffix(".hidden"))
    assert "was damaged while it was open" in why(engine, request)
    for file in files:
        file.with_suffix(".hidden").rename(file)
    again, new = (ask(engine, tokens[i : i + 100], memory_read="book") for i in (3000, 3200))
    outputs = engine.run()
    made = [reference.memorize(tokens[:500])]
    for output in (first, outputs[again], outputs[new]):
        assert_answer(output, reference, TINY, made)
    engine.assert_empty()


def test_a_reader_alone_in_a_small_engine(start_engine: Any, model: Path, tokens: list[int], tmp_path: Path) -> None:
    engine = start(start_engine, model, tmp_path / "memories", max_model_len=512, max_num_seqs=1)
    write(engine, "book", tokens[:500])
    read = ask(engine, tokens[3000:3300], memory_read="book")
    assert engine.run()[read].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("sampling", [{"n": 2, "temperature": 1}, {"stop": ["x"]}])
def test_what_cannot_be_written_well_is_refused(
    start_engine: Any, model: Path, tokens: list[int], tmp_path: Path, sampling: dict[str, Any]
) -> None:
    engine = start(start_engine, model, tmp_path / "memories")
    with pytest.raises(ValueError, match="memory_write"):
        engine.add(tokens[:50], extra_args={"memory_write": "a"}, **sampling)
