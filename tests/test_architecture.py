"""The house stays as docs/architecture.md says: who imports whom, how long functions grow, where errors are caught."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "onnx_lrs"
LONGEST_BODY = 60  # lines
MOST_PARAMETERS = 8
CALLED_BY_NAME = {  # their parameters are keywords that a pipeline names; three more are allowed
    "onnx_lrs.api.compress",
    "onnx_lrs.api.refine",
}
TOP = {"onnx_lrs.cli", "onnx_lrs.api", "onnx_lrs.pipeline", "onnx_lrs.comparison", "onnx_lrs.refining"}
ON_THE_GROUND = {
    "onnx_lrs.errors": set(),
    "onnx_lrs.native": set(),
    "onnx_lrs.progress": set(),
    "onnx_lrs.config": {"onnx_lrs.errors"},
    "onnx_lrs.images": {"onnx_lrs.config", "onnx_lrs.errors"},
    "onnx_lrs.data": {"onnx_lrs.config", "onnx_lrs.errors", "onnx_lrs.images"},
    "onnx_lrs.work": {"onnx_lrs.errors"},
}
OPTIONAL = {"jinja2", "markupsafe", "matplotlib", "torch", "onnx2torch", "dask", "cvxpy"}
NEED_TORCH = ("augment", "loop", "losses", "refine", "rounding", "student")
TRAINING = {f"onnx_lrs.training.{name}" for name in NEED_TORCH}
DOOR = "onnx_lrs.training.door"
BROAD = {"Exception", "BaseException"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclasses.dataclass(frozen=True)
class Import:
    """One import: the module named, and whether it happens when the importing module is loaded."""

    target: str
    at_load: bool


@dataclasses.dataclass(frozen=True)
class Module:
    name: str
    tree: ast.Module
    imports: tuple[Import, ...]

    def packages(self) -> set[str]:
        """First parts of everything it imports, wherever the import stands."""
        return {i.target.partition(".")[0] for i in self.imports}

    def inside(self) -> set[str]:
        """Modules of onnx_lrs that it imports, wherever the import stands."""
        return {i.target for i in self.imports if i.target.startswith("onnx_lrs")}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(node: ast.AST, names: set[str], at_load: bool = True) -> Iterator[Import]:
    """Yield what a piece of source imports; what only the type checker sees is no import."""
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, at_load) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            yield Import(submodule if submodule in names else str(node.module), at_load)
    elif not is_type_checking(node):
        for child in ast.iter_child_nodes(node):
            yield from imports_of(child, names, at_load and not isinstance(node, FUNCTIONS))


def read_package() -> dict[str, Module]:
    paths = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    return {name: Module(name, tree, tuple(imports_of(tree, set(paths)))) for name, tree in trees.items()}


MODULES = read_package()


def within(wing: str) -> list[Module]:
    return [m for m in MODULES.values() if m.name == f"onnx_lrs.{wing}" or m.name.startswith(f"onnx_lrs.{wing}.")]


def test_the_reader_sees_imports_wherever_they_stand():
    source = (
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import never\nif x:\n    import e\n"
        "def f():\n    import g\nclass K:\n    import h\n    def m(self):\n        from i.j import k\n"
    )
    found = {(i.target, i.at_load) for i in imports_of(ast.parse(source), set())}
    assert found == {("a.b", True), ("c", True), ("e", True), ("g", False), ("h", True), ("i.j", False)}


def test_the_package_is_found():
    assert {"onnx_lrs", "onnx_lrs.pipeline", "onnx_lrs.solvers.solve", "onnx_lrs.graph.rewrite"} <= set(MODULES)


def test_solvers_know_arrays_only():
    for module in within("solvers"):
        assert module.packages() <= {"__future__", "collections", "dataclasses", "enum", "typing", "numpy", "scipy"} | {
            *("contextlib", "functools", "itertools", "math", "onnx_lrs", "cvxpy", "threadpoolctl")
        }
        assert all(name.startswith("onnx_lrs.solvers") for name in module.inside())


@pytest.mark.parametrize(("package", "wing"), [("onnx_graphsurgeon", "graph"), ("onnxruntime", "runtime")])
def test_a_library_has_one_door(package, wing):
    users = {m.name for m in MODULES.values() if package in m.packages()}
    assert users
    assert users <= {m.name for m in within(wing)}


def test_graph_knows_neither_samples_nor_sessions():
    for module in within("graph"):
        assert not [n for n in module.inside() if n.startswith(("onnx_lrs.runtime", "onnx_lrs.calibration"))]
        assert not [n for n in module.inside() if n.startswith(("onnx_lrs.planning", "onnx_lrs.report"))]


def test_nothing_below_imports_the_top():
    allowed = {
        "onnx_lrs.__main__": {"onnx_lrs.cli"},
        "onnx_lrs.cli": {"onnx_lrs.api"},
        "onnx_lrs.demo": {"onnx_lrs.api"},
        "onnx_lrs.api": {"onnx_lrs.pipeline", "onnx_lrs.comparison", "onnx_lrs.refining"},
    }
    for module in MODULES.values():
        assert module.inside() & TOP <= allowed.get(module.name, set()), module.name


@pytest.mark.parametrize("name", ON_THE_GROUND)
def test_the_ground_rests_on_nothing(name):
    assert MODULES[name].inside() <= ON_THE_GROUND[name]


def test_optional_libraries_are_imported_where_they_are_needed():
    for module in MODULES.values():
        allowed = {"torch", "onnx2torch"} if module.name in TRAINING else set()
        for item in module.imports:
            found = {item.target.partition(".")[0]} & OPTIONAL
            assert not item.at_load or found <= allowed, (module.name, item.target)


def test_what_needs_torch_is_behind_one_door():
    for module in MODULES.values():
        if module.name not in TRAINING | {DOOR}:
            assert not {"torch", "onnx2torch"} & module.packages(), module.name
            assert not TRAINING & module.inside(), module.name
    assert not any(item.at_load for item in MODULES[DOOR].imports if item.target in TRAINING | {"torch"})


def test_no_module_imports_itself_through_others():
    graph = {m.name: {i.target for i in m.imports if i.target in MODULES} - {"onnx_lrs"} for m in MODULES.values()}
    del graph["onnx_lrs"]  # loads its names lazily
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


def body_lines(node: ast.FunctionDef) -> int:
    """Lines from the first statement behind the docstring to the end."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return node.end_lineno - body[0].lineno + 1 if body else 0


def parameters(node: ast.FunctionDef) -> list[str]:
    a = node.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [p.arg for p in every if p.arg not in ("self", "cls")]


def test_functions_stay_short():
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            if isinstance(node, FUNCTIONS):
                where = f"{module.name}.{node.name}"
                assert body_lines(node) <= LONGEST_BODY, where
                assert len(parameters(node)) <= MOST_PARAMETERS + 3 * (where in CALLED_BY_NAME), where


def test_broad_excepts_only_where_onnxruntime_raises():
    """Its exceptions share no base class but Exception; everywhere else an error that nobody expected is a bug."""
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ExceptHandler) and module.name != "onnx_lrs.runtime.session":
                assert node.type is not None, f"bare except in {module.name}:{node.lineno}"
                names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                assert not names & BROAD, f"{module.name}:{node.lineno}"


def test_no_caught_error_is_dropped_silently():
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ExceptHandler):
                assert not all(isinstance(s, ast.Pass) for s in node.body), f"{module.name}:{node.lineno}"
