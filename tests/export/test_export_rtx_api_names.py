"""Risk: a call of the TensorRT API that no machine of ours can run is misspelt, or gets the wrong arguments.

TensorRT 11 and TensorRT for RTX have the same Python classes, and the bindings of the second import without a GPU. The
classes of our variables follow from annotations (`config: trt.IBuilderConfig`), constructors, and return types in the
bindings' docstrings.
"""

from __future__ import annotations

import ast
import inspect
import re
import types
from typing import Any

import pytest

from fastory.export import build_engines
from fastory.models import tensorrt_session

pytestmark = pytest.mark.rtx
pytest.importorskip(
    "tensorrt_rtx_libs", reason="TensorRT for RTX is not installed (pip install 'fastory[rtx]')"
)
trt = pytest.importorskip("tensorrt_rtx_bindings")


class Uses(ast.NodeVisitor):
    """Every attribute of the bindings' classes that a module reads or sets (`used`), and what is wrong with it."""

    def __init__(self, source: str) -> None:
        self.used: set[str] = set()
        self.wrong: list[str] = []
        self.variables: dict[str, Any] = {}
        tree = ast.parse(source)
        annotated = [one for one in ast.walk(tree) if isinstance(one, ast.AnnAssign | ast.arg)]
        named = {ast.unparse(getattr(one, "target", one)): class_of(one.annotation) for one in annotated}
        # Of a dataclass: `context: trt.IExecutionContext` is what `prepared.context` is.
        self.members = {name: kind for name, kind in named.items() if kind is not None}
        self.visit(tree)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside, self.variables = self.variables, {**self.variables, "trt": trt}
        for one in node.args.args:
            if (kind := class_of(one.annotation)) is not None:
                self.variables[one.arg] = kind
        self.generic_visit(node)
        self.variables = outside

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        kind = self.type_of(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name) and kind is not None:
                self.variables[target.id] = kind

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if (kind := class_of(node.annotation)) is not None:
            self.variables[ast.unparse(node.target)] = kind

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        owner = self.type_of(node.value)
        if owner is None:
            return
        self.used.add(f"{owner.__name__}.{node.attr}")
        if not hasattr(owner, node.attr):
            self.wrong.append(f"{owner.__name__} has no {node.attr}")

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        function = self.function_of(node)
        if function is not None and not any(fits(one, node) for one, _ in overloads(function)):
            self.wrong.append(f"{ast.unparse(node)} does not fit {inspect.getdoc(function)}")

    def function_of(self, node: ast.Call) -> Any:
        """The bindings' function that is called; for a class its constructor; None for functions of others."""
        if not isinstance(node.func, ast.Attribute):
            return None
        found = getattr(self.type_of(node.func.value), node.func.attr, None)
        return found.__init__ if isinstance(found, type) else found

    def type_of(self, node: ast.AST) -> Any:
        """The bindings' class of an expression, or the bindings themselves; None where it is of others."""
        if isinstance(node, ast.Name):
            return self.variables.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.type_of(node.value)
            if owner is None:
                return self.members.get(node.attr)
            found = getattr(owner, node.attr, None)
            return found if isinstance(found, type) else None
        if isinstance(node, ast.Call):
            function = self.function_of(node)
            if isinstance(self.type_of(node.func), type):
                return self.type_of(node.func)
            returned = {result for _, result in overloads(function)} if function is not None else set()
            return returned.pop() if len(returned) == 1 else None
        return None


def class_of(annotation: ast.AST | None) -> Any:
    """The class of an annotation `trt.X`."""
    match annotation:
        case ast.Attribute(value=ast.Name(id="trt"), attr=name):
            return getattr(trt, name)
    return None


def overloads(function: Any) -> list[tuple[list[tuple[str, bool]], Any]]:
    """Of every overload in a pybind11 docstring: (name, required) of its arguments but self, and the returned class."""
    signature = re.compile(rf"^\s*(?:\d+\. )?{function.__name__}\((self.*)\) -> (.*)$", re.MULTILINE)
    found = []
    for arguments, result in signature.findall(function.__doc__ or ""):
        plain = re.sub(r"<[^>]*>|\[[^]]*\]", "", arguments)
        named = [(one.split(":")[0].strip(), "=" not in one) for one in plain.split(",")[1:]]
        name = re.split(r"[.:]", result)[-1]
        # One docstring names the C++ class, which has an I more.
        found.append((named, getattr(trt, name, None) or getattr(trt, name.removeprefix("I"), None)))
    return found


def fits(known: list[tuple[str, bool]], call: ast.Call) -> bool:
    """Whether a signature takes the arguments of a call. A call of Class.__init__ gives self as well."""
    unbound = isinstance(call.func, ast.Attribute) and call.func.attr == "__init__"
    given = call.args[1:] if unbound else call.args
    if any(isinstance(one, ast.Starred) for one in given):
        return len(given) <= len(known)
    rest, names = known[len(given) :], {one.arg for one in call.keywords}
    required = {name for name, needed in rest if needed}
    return len(given) <= len(known) and required <= names <= {name for name, _ in rest}


@pytest.mark.parametrize(
    ("module", "calls"),
    [
        (
            build_engines,
            {
                *("Builder.create_network", "Builder.build_serialized_network", "OnnxParser.parse_from_file"),
                *("ParserError.desc", "IBuilderConfig.set_flag", "IBuilderConfig.set_compute_capability"),
                *(
                    "IBuilderConfig.set_timing_cache",
                    "ITimingCache.serialize",
                    "IOptimizationProfile.set_shape",
                ),
                *("BuilderFlag.VERSION_COMPATIBLE", "HardwareCompatibilityLevel.AMPERE_PLUS"),
            },
        ),
        (
            tensorrt_session,
            {
                *("Runtime.deserialize_cuda_engine", "ICudaEngine.create_execution_context"),
                *("ICudaEngine.get_tensor_profile_shape", "ICudaEngine.get_tensor_dtype"),
                *("IExecutionContext.set_input_shape", "IExecutionContext.set_tensor_address"),
                *("IExecutionContext.set_device_memory", "IExecutionContext.execute_async_v3"),
                *("IExecutionContext.get_tensor_shape", "Refitter.refit_cuda_engine"),
                *("OnnxParserRefitter.refit_from_file", "ParserError.desc"),
            },
        ),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_every_name_exists_and_every_call_fits(module: types.ModuleType, calls: set[str]) -> None:
    uses = Uses(inspect.getsource(module))
    assert uses.wrong == []
    assert calls <= uses.used, "the check lost track of what these variables are"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("builder.create_netwerk()", "Builder has no create_netwerk"),
        ("builder.create_network(flags=0, more=1)", "does not fit"),
        ("builder.create_optimization_profile().set_shape('q', (1,), (2,))", "does not fit"),
        ("builder.create_builder_config().set_flag(trt.BuilderFlag.FP16)", "BuilderFlag has no FP16"),
        ("config.platform = 1", "IBuilderConfig has no platform"),
        ("prepared.context.execute_async_v2(0)", "IExecutionContext has no execute_async_v2"),
        ("trt.Bilder(logger)", "tensorrt_rtx_bindings has no Bilder"),
        ("trt.OnnxParser(logger)", "does not fit"),
    ],
)
def test_a_wrong_call_is_found(line: str, said: str) -> None:
    source = (
        "class Prepared:\n context: trt.IExecutionContext\n"
        f"def one(trt, logger, config: trt.IBuilderConfig):\n builder = trt.Builder(logger)\n {line}\n"
    )
    assert said in "; ".join(Uses(source).wrong)
