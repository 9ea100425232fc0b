"""The architecture as the import statements tell it. No module of the project is imported here."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("memlong_vllm", "engine_patches")
MAX_LINES = 400
VAGUE_NAMES = ("util", "helper", "misc", "toolkit")
MAY_IMPORT_VLLM = (
    "memlong_vllm",
    "memlong_vllm.capacity",
    "memlong_vllm.model",
    "memlong_vllm.retrieval_attention",
    "memlong_vllm.local_attention*",
    "memlong_vllm.scheduler.output",
    "memlong_vllm.scheduler.scheduler",
    "memlong_vllm.worker.model_state",
    "memlong_vllm.cli.*",
    "memlong_vllm.demo.session",
    "memlong_vllm.named",
    "memlong_vllm.evaluation.vllm_scorer",
    "engine_patches",
    "engine_patches.*",
)
# config re-exports the checkpoint's configuration from the reference. Shards are written and read
# by workers; the scheduler's side knows their names and headers only.
SHARDS = {f"memlong_vllm.memories.{module}" for module in ("shards", "shard_layout", "durable", "errors")}
SHARED = {"memlong_vllm.plan", "memlong_vllm.config", "memlong_vllm.reference.configuration_memlong"} | SHARDS
SHARED |= {"memlong_vllm.process_cpus"}
CYCLE = {"a": {"b"}, "b": {"c"}, "c": {"a"}}

Graph = dict[str, set[str]]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, Path]:
    """Every module of ours and its file."""
    return {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST, *, lazy: bool, typing: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements below a node: ``lazy``, also within functions; ``typing``, also those that
    only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not (isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy):
            if is_type_checking(child) and not typing:
                yield from statements(ast.Module(child.orelse, []), lazy=lazy, typing=typing)  # type: ignore[attr-defined]
            else:
                yield from statements(child, lazy=lazy, typing=typing)


def names(statement: ast.Import | ast.ImportFrom, module: str, *, is_package: bool) -> set[str]:
    """Modules that a statement imports: of ``from a import b``, ``a.b`` if that is one of ours,
    else ``a``."""
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names}
    parts = module.split(".")
    base = parts[: len(parts) - statement.level + is_package] if statement.level else []
    source = ".".join([*base, *([statement.module] if statement.module else [])])
    return {name if (name := f"{source}.{alias.name}") in sources() else source for alias in statement.names}


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text(encoding="utf-8"))


def imports(module: str, *, lazy: bool = True, typing: bool = True) -> set[str]:
    is_package = sources()[module].name == "__init__.py"
    found: set[str] = set()
    for statement in statements(parsed(module), lazy=lazy, typing=typing):
        found |= names(statement, module, is_package=is_package)
    return found


def ours(module: str, *, lazy: bool = True, typing: bool = True) -> set[str]:
    return imports(module, lazy=lazy, typing=typing) & set(sources())


def graph(*, lazy: bool = True, typing: bool = True) -> Graph:
    edges = {module: ours(module, lazy=lazy, typing=typing) for module in sources()}
    # It imports the module of the installed version by name.
    edges["engine_patches"] |= folder("engine_patches") - {"engine_patches"}
    return edges


def reachable(edges: Graph, starts: set[str]) -> set[str]:
    found, waiting = set(starts), list(starts)
    while waiting:
        new = edges[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def folder(name: str) -> set[str]:
    return {module for module in sources() if module == name or module.startswith(f"{name}.")}


def top_level(name: str) -> str:
    return name.partition(".")[0]


def test_the_modules_are_found() -> None:
    assert {"memlong_vllm", "memlong_vllm.plan", "memlong_vllm.scheduler.ledger", "engine_patches"} <= set(sources())
    assert "memlong_vllm.plan" in ours("memlong_vllm.scheduler.ledger")
    assert "memlong_vllm.reference.retrieval" in ours("memlong_vllm.reference.modeling_memlong")
    assert "engine_patches" in ours("memlong_vllm")
    assert "engine_patches" not in ours("memlong_vllm", lazy=False)


def test_cycles_are_seen() -> None:
    with pytest.raises(CycleError):
        tuple(TopologicalSorter(CYCLE).static_order())


def test_imports_form_a_dag() -> None:
    """Also with imports inside functions and those for type checkers."""
    order = tuple(TopologicalSorter(graph()).static_order())
    assert set(order) == set(sources())


def test_scheduler_and_worker_share_only_plan_and_config() -> None:
    """By whatever way: through all that is imported together with them."""
    edges = graph(lazy=False)
    scheduler = reachable(edges, folder("memlong_vllm.scheduler"))
    worker = reachable(edges, folder("memlong_vllm.worker"))
    assert scheduler & worker <= SHARED
    assert "memlong_vllm.plan" in scheduler & worker


@pytest.mark.parametrize(
    ("side", "other"),
    [
        ("memlong_vllm.scheduler", "memlong_vllm.worker"),
        ("memlong_vllm.worker", "memlong_vllm.scheduler"),
        ("memlong_vllm.worker", "memlong_vllm.retriever"),
        ("memlong_vllm.retriever", "memlong_vllm.scheduler"),
        ("memlong_vllm.retriever", "memlong_vllm.worker"),
        ("memlong_vllm.memories", "memlong_vllm.scheduler"),
        ("memlong_vllm.memories", "memlong_vllm.worker"),
        ("memlong_vllm.memories", "memlong_vllm.retriever"),
    ],
)
def test_no_side_imports_another_even_lazily(side: str, other: str) -> None:
    assert {module: ours(module) & folder(other) for module in folder(side)} == {m: set() for m in folder(side)}


def test_serving_does_without_evaluation() -> None:
    """And evaluation looks at engines from outside, as any program does."""
    evaluation = folder("memlong_vllm.evaluation") | folder("memlong_vllm.cli")
    # The demo model is made by convert.
    others = set(sources()) - evaluation - {"memlong_vllm.demo_model"}
    assert {module: ours(module) & evaluation for module in others} == {module: set() for module in others}
    inside = folder("memlong_vllm.scheduler") | folder("memlong_vllm.worker") | {"memlong_vllm.model"}
    assert not {name for module in folder("memlong_vllm.evaluation") for name in ours(module)} & inside


def test_of_named_memories_workers_know_the_shards_only() -> None:
    edges = graph()
    assert reachable(edges, folder("memlong_vllm.worker")) & folder("memlong_vllm.memories") <= SHARDS
    assert reachable(edges, SHARDS) == SHARDS


def test_of_named_memories_only_the_shards_contents_need_torch() -> None:
    importing = {m for m in folder("memlong_vllm.memories") if {"vllm", "torch"} & set(map(top_level, imports(m)))}
    assert importing == {"memlong_vllm.memories.shards"}


def test_adapters_know_the_configuration_only() -> None:
    """Training makes them and commands merge them, so neither can be needed for one."""
    adapters = folder("memlong_vllm.adapters")
    assert reachable(graph(), adapters) - adapters <= SHARED
    assert "memlong_vllm.adapters.merge" in adapters


def test_training_does_without_engine_and_evaluation() -> None:
    """It needs the reference, the retriever's embedder and adapters, and nobody but commands needs it."""
    training = folder("memlong_vllm.training")
    allowed = folder("memlong_vllm.adapters") | folder("memlong_vllm.reference") | SHARED | {"memlong_vllm.ridge"}
    allowed |= {"memlong_vllm.recall_material", "memlong_vllm.adapter_input", "memlong_vllm.package_versions"}
    allowed |= {"memlong_vllm.memories.fingerprint", "memlong_vllm.memories.errors", "memlong_vllm.retriever.embedder"}
    assert {name for module in training for name in ours(module)} <= training | allowed
    users = {module for module in sources() if ours(module) & training} - training
    assert users == {"memlong_vllm.cli.finetune"}


def test_only_the_modules_that_must_import_vllm() -> None:
    importing = {module for module in sources() if "vllm" in map(top_level, imports(module, typing=False))}
    allowed = {module for module in sources() if any(fnmatch(module, pattern) for pattern in MAY_IMPORT_VLLM)}
    assert importing <= allowed
    assert "memlong_vllm.scheduler.scheduler" in importing


@pytest.mark.parametrize("module", ["ledger", "eviction", "segments", "sequence_retriever", "trace"])
def test_decisions_do_without_vllm_and_torch(module: str) -> None:
    found = set(map(top_level, imports(f"memlong_vllm.scheduler.{module}")))
    assert not found & {"vllm", "torch", "transformers"}


@pytest.mark.parametrize("module", ["plan", "recall_material", "evaluation.statistics"])
def test_what_needs_the_standard_library_only(module: str) -> None:
    found = set(map(top_level, imports(f"memlong_vllm.{module}")))
    assert found
    assert found <= set(sys.stdlib_module_names)


def test_linear_maps_need_torch_only() -> None:
    """Training and measuring share them."""
    assert set(map(top_level, imports("memlong_vllm.ridge"))) <= {"torch", "__future__"}


def test_the_probe_is_a_tool_of_its_own() -> None:
    """Only its command imports it, and it knows nothing of how memory is served."""
    edges = graph()
    assert {m for m in sources() if edges[m] & folder("memlong_vllm.probe")} - folder("memlong_vllm.probe") == {
        "memlong_vllm.cli.probe"
    }
    served = {f"memlong_vllm.{side}" for side in ("scheduler", "worker", "memories", "retriever", "endpoints")}
    reached = reachable(graph(typing=False), folder("memlong_vllm.probe"))
    assert not any(reached & folder(side) for side in served)


def test_the_probes_trials_need_neither_torch_nor_transformers() -> None:
    assert not {"torch", "transformers"} & set(map(top_level, imports("memlong_vllm.probe.trials")))


@pytest.mark.parametrize("module", sorted(folder("memlong_vllm.reference")))
def test_the_reference_imports_nothing_of_ours_from_outside(module: str) -> None:
    """It is copied into checkpoints, so what it imports of itself must be named relatively."""
    assert ours(module) <= folder("memlong_vllm.reference")
    absolute = {name for s in statements(parsed(module), lazy=True, typing=True) for name in absolute_names(s)}
    assert not set(map(top_level, absolute)) & set(PACKAGES)


def absolute_names(statement: ast.Import | ast.ImportFrom) -> set[str]:
    is_relative = isinstance(statement, ast.ImportFrom) and statement.level > 0
    return set() if is_relative else names(statement, "", is_package=False)


@pytest.mark.parametrize("module", sorted(sources()))
def test_names_say_what_is_in_a_module(module: str) -> None:
    assert not [part for part in module.split(".") if any(vague in part for vague in VAGUE_NAMES)]


@pytest.mark.parametrize("module", sorted(sources()))
def test_modules_are_short(module: str) -> None:
    assert len(sources()[module].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


PARSED = [
    ("import a.b", "memlong_vllm.plan", {"a.b"}),
    ("from a import b, c", "memlong_vllm.plan", {"a"}),
    ("from memlong_vllm import plan, register", "engine_patches", {"memlong_vllm.plan", "memlong_vllm"}),
    ("from . import plan", "memlong_vllm.config", {"memlong_vllm.plan"}),
    ("from .plan import StepPlan", "memlong_vllm.config", {"memlong_vllm.plan"}),
    ("from ..plan import StepPlan", "memlong_vllm.worker.bank", {"memlong_vllm.plan"}),
    ("from ..plan import StepPlan", "memlong_vllm.worker", {"memlong_vllm.plan"}),
]


@pytest.mark.parametrize(("code", "module", "expected"), PARSED)
def test_import_statements_are_read_right(code: str, module: str, expected: set[str]) -> None:
    (statement,) = statements(ast.parse(code), lazy=False, typing=False)
    assert names(statement, module, is_package=sources()[module].name == "__init__.py") == expected


def test_lazy_and_typing_imports_are_told_apart() -> None:
    code = "import a\ndef f():\n    import b\nif TYPE_CHECKING:\n    import c\n"
    code += "else:\n    import d\nclass K:\n    import e\n"
    tree = ast.parse(code)

    def found(**which: bool) -> list[str]:
        return [alias.name for s in statements(tree, **which) for alias in s.names]

    assert found(lazy=False, typing=False) == ["a", "d", "e"]
    assert found(lazy=True, typing=False) == ["a", "b", "d", "e"]
    assert found(lazy=True, typing=True) == ["a", "b", "c", "d", "e"]
