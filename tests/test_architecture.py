"""Dependencies point one way, and training cannot reach the truth; read from the source, imports in functions included.

A package's module stands for its ``__init__``: importing ``fgalign.a.b`` runs ``fgalign`` and ``fgalign.a`` too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fgalign
from fgalign.config import Profile
from fgalign.context import Context
from fgalign.errors import ConfigError
from fgalign.methods import METHODS, get_method

ROOT = Path(fgalign.__file__).parent


def module_name(path: Path) -> str:
    parts = ("fgalign", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in FILES.items()}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def names_imported(tree: ast.AST) -> set[str]:
    """Every module that a tree imports anywhere, and every ``module.name`` that it imports from one."""
    found: set[str] = set()
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif is_type_checking(node):
            waiting += node.orelse
            continue
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
        waiting += ast.iter_child_nodes(node)
    return found


def with_packages(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)}


def direct(name: str) -> set[str]:
    """Modules of fgalign that a module imports, without the packages around it."""
    targets = {part for found in names_imported(TREES[name]) for part in with_packages(found)}
    return (targets & set(TREES)) - {"fgalign", name}


def reachable(name: str) -> set[str]:
    """Modules of fgalign that importing a module, and calling what is in it, can import."""
    seen: set[str] = set()
    waiting = [*with_packages(name)]
    while waiting:
        module = waiting.pop()
        if module in TREES and module not in seen:
            seen.add(module)
            waiting += direct(module)
    return seen - {name}


def outside(name: str) -> set[str]:
    """Top-level packages other than fgalign that a module imports."""
    return {found.split(".")[0] for found in names_imported(TREES[name])} - {"fgalign"}


def in_package(package: str) -> list[str]:
    return [name for name in TREES if name == package or name.startswith(package + ".")]


TRAINING = [
    "fgalign.base_model",
    "fgalign.context",
    *(f"fgalign.core.{name}" for name in ("modeling", "rollout", "tensor_ops", "tokens")),
    "fgalign.ppo_trainer",
    "fgalign.sft",
    "fgalign.stages.judge_model",
    "fgalign.stages.train",
    "fgalign.training",
    *in_package("fgalign.losses"),
    *in_package("fgalign.methods"),
    *in_package("fgalign.rewards"),
]


def test_the_graph_sees_imports_everywhere():
    # Checks of the checker, on imports that the source is known to have.
    assert "fgalign.core.tensor_ops" in direct("fgalign.losses.ppo")  # at the top
    assert "fgalign.sft" in direct("fgalign.base_model")  # inside a function
    assert "fgalign.annotate.simulated" in direct("fgalign.annotate")  # of a package, inside a function
    assert "fgalign.sources.simulator.gold" in reachable("fgalign.stages.data")  # through several modules
    assert names_imported(ast.parse("def f():\n    import importlib\n    importlib.import_module('a.b')")) >= {"a.b"}
    assert names_imported(ast.parse("if TYPE_CHECKING:\n    import a\nelse:\n    import b")) == {"b"}


def test_tensor_ops_import_nothing_of_ours():
    assert direct("fgalign.core.tensor_ops") <= {"fgalign.core", "fgalign.errors"}
    assert outside("fgalign.core.tensor_ops") == {"__future__", "collections", "torch", "typing"}


@pytest.mark.parametrize("name", in_package("fgalign.losses"))
def test_losses_import_only_tensors_and_records(name):
    core = {"fgalign.core", "fgalign.core.tensor_ops", "fgalign.core.schema"}
    assert direct(name) <= {"fgalign.losses", "fgalign.errors", *core}
    assert "transformers" not in outside(name)


@pytest.mark.parametrize("name", in_package("fgalign.methods"))
def test_methods_never_import_each_other(name):
    others = set(in_package("fgalign.methods")) - {"fgalign.methods", name}
    assert not direct(name) & others
    assert not reachable(name) & others


def test_the_registry_names_every_method():
    assert sorted(METHODS.values()) == sorted(set(in_package("fgalign.methods")) - {"fgalign.methods"})
    for kind in METHODS:
        module = get_method(kind)
        assert callable(module.run) and module.Config.model_fields["kind"].annotation.__args__ == (kind,)
    with pytest.raises(ConfigError, match="methods: unknown kind 'dpo9'; expected one of figa, ppo"):
        get_method("dpo9")


@pytest.mark.parametrize("name", TRAINING)
def test_training_cannot_reach_the_truth(name):
    forbidden = {"fgalign.sources.simulator.gold", *in_package("fgalign.evaluation")}
    assert not reachable(name) & forbidden


@pytest.mark.parametrize("name", TRAINING)
def test_training_names_no_file_of_the_truth(name):
    # Folders and files are named by string constants: none in training is "gold", "test" or a path with such a part.
    constants = {node.value for node in ast.walk(TREES[name]) if isinstance(node, ast.Constant)}
    paths = {value for value in constants if isinstance(value, str) and " " not in value}
    parts = {part.split(".")[0] for value in paths for part in value.split("/")}
    assert not parts & {"gold", "test"}
    used = {node.attr for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)}
    assert not (names_imported(TREES[name]) | used) & {
        "read_truth",
        "fgalign.core.schema.GoldMarks",
        "fgalign.core.schema.SPLITS",
    }


def test_the_check_of_paths_sees_them():
    # The same reading finds the truth where it is opened.
    constants = {node.value for node in ast.walk(TREES["fgalign.stages.judge"]) if isinstance(node, ast.Constant)}
    assert {"gold", "test"} <= constants


@pytest.mark.parametrize("split", ["test", "gold", "../gold/train", "", "Test"])
def test_context_refuses_the_test_split(tmp_path, split):
    context = Context(Profile("mini", tmp_path, {}, tmp_path / "params.yaml"), "sft", 1, None, None, tmp_path)
    for read in (context.split, context.labelled):
        with pytest.raises(ConfigError, match="training may open 'train' and 'validation', not"):
            read(split)


@pytest.mark.parametrize("name", sorted(TREES))
def test_only_tracking_knows_mlflow(name):
    assert ("mlflow" in outside(name)) == (name == "fgalign.tracking")


@pytest.mark.parametrize("name", in_package("fgalign.report"))
def test_report_reads_results_and_computes_nothing(name):
    everything = {name, *reachable(name)}
    used = {package for module in everything for package in outside(module)}
    assert not used & {"torch", "transformers", "trl", "peft", "accelerate"}
    assert not any(module.startswith(("fgalign.methods", "fgalign.rewards", "fgalign.losses")) for module in everything)


def test_no_import_cycle():
    """No module needs itself while it is being imported (imports inside functions wait, so they do not count)."""
    graph = {}
    for name, tree in TREES.items():
        top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        targets = {part for found in names_imported(top) for part in with_packages(found)}
        graph[name] = (targets & set(TREES)) - with_packages(name)
    done: set[str] = set()
    while ready := {name for name, targets in graph.items() if name not in done and targets <= done}:
        done |= ready
    assert set(graph) - done == set()
