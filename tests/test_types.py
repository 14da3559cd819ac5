"""Every public function and method of the code that others call says what it takes and what it returns.

`mypy` checks the body of an annotated function only, so one without annotations is checked nowhere.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ("configs/config.py", "data/*.py", "models/*.py", "models/fast/*.py", "rlhf/utils.py")


def public_functions(body, inside=""):
    """(name, node) of the public functions and methods of a module or a class, conditional ones included."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from public_functions(node.body, f"{inside}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if not node.name.startswith("_"):
                yield inside + node.name, node
        elif isinstance(node, (ast.If, ast.Try)):
            handlers = [line for handler in getattr(node, "handlers", []) for line in handler.body]
            yield from public_functions([*node.body, *handlers, *node.orelse, *getattr(node, "finalbody", [])], inside)


def unannotated(text):
    """What has no annotation in the source `text`: 'f: seed' for a parameter of f, 'f: return' for its result.

    The forward and backward of an autograd Function, whose first parameter is `ctx`, are left out.
    """
    missing = []
    for name, node in public_functions(ast.parse(text).body):
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if node.name in ("forward", "backward") and parameters and parameters[0].arg == "ctx":
            continue
        missing += [f"{name}: {p.arg}" for p in parameters if p.annotation is None and p.arg not in ("self", "cls")]
        missing += [f"{name}: return"] if node.returns is None else []
    return missing


def test_every_public_function_is_annotated():
    files = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
    assert len(files) > len(PATTERNS)
    missing = [
        f"{path.relative_to(ROOT)} {what}" for path in files for what in unannotated(path.read_text(encoding="utf-8"))
    ]
    assert not missing, "\n".join(missing)


def test_an_unannotated_function_is_found():
    text = """
def good(a: int, *args, b: str = "", **kwargs) -> None: ...
def bad(a, *, b: int = 0): ...
def _private(a): ...
class Thing:
    def method(self, x) -> int: ...
    def forward(self, x: int): ...
class Product(Function):
    @staticmethod
    def forward(ctx, x): ...
"""
    assert unannotated(text) == ["bad: a", "bad: return", "Thing.method: x", "Thing.forward: return"]
