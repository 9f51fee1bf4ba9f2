"""No state is left where another caller would find it: in networks, and in caches of what can be changed."""

import ast
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "companion"
FILES = sorted(SRC.rglob("*.py"))


CHANGEABLE = ("Tensor", "Prior", "Denoiser", "Module", "Slices", "Network", "Codec", "Translator")


def cached(function) -> bool:
    names = [ast.unparse(d).partition("(")[0].rpartition(".")[2] for d in function.decorator_list]
    return bool({"cache", "lru_cache"} & set(names))


def lasting(tree) -> list[ast.FunctionDef]:
    """Functions of a module and of its classes, but not those inside functions: their caches end with the call."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return [node for where in (tree, *classes) for node in where.body if isinstance(node, ast.FunctionDef)]


def test_no_cache_of_the_papers_holds_models_or_images():
    """A cached model sits on a device, and whoever changes it changes everybody's; so do cached tensors."""
    kept = []
    for path in FILES:
        if path.relative_to(SRC).parts[0] in ("papers", "reconstruction", "evaluation", "models"):
            for function in filter(cached, lasting(ast.parse(path.read_text()))):
                returned = ast.unparse(function.returns) if function.returns else "Tensor"
                if any(word in returned for word in CHANGEABLE):
                    kept.append(f"{path.relative_to(SRC).as_posix()}: {function.name}")
    assert not kept


def test_nobody_sets_the_context_of_a_network():
    """It would stay set for the next holder of the same network; `with network.attending(...)` puts it back."""
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                if (
                    isinstance(target, ast.Attribute)
                    and target.attr == "context"
                    and ast.unparse(target.value) != "self"
                ):
                    found.append(f"{path.name}: {ast.unparse(node)}")
    assert not found


def forms() -> set[str]:
    """The names of all classes of parameters of notebooks."""
    trees = [ast.parse(path.read_text()) for path in FILES if path.is_relative_to(SRC / "papers")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found, before = {"Parameters", "Training"}, set()
    while found != before:  # forms of forms, too
        before = found
        found = found | {c.name for c in classes if {ast.unparse(base) for base in c.bases} & found}
    return found - {"Parameters", "Training"}


def test_only_prepare_train_and_study_see_a_form():
    """Everything below them takes what it uses, so that it can be called outside of its notebook."""
    names, others = forms(), []
    for path in (p for p in FILES if p.is_relative_to(SRC / "papers")):
        for function in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)):
            kinds = {ast.unparse(a.annotation) for a in function.args.args if a.annotation}
            if kinds & names and function.name.partition("_")[0] not in ("prepare", "train", "study"):
                others.append(f"{path.relative_to(SRC)}: {function.name}")
    assert len(names) > 10 and not others
