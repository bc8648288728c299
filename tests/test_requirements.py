"""Every package that is imported is declared in a requirements.txt."""

import ast
import re
import sys
from importlib.metadata import packages_distributions

from conftest import CODE, ROOT

OPTIONAL = {"jax"}  # a contender of benchmark.py, if it is installed
DISTRIBUTIONS = packages_distributions()


def declared(path):
    """Return the names of the packages in a requirements file."""
    lines = path.read_text().splitlines()
    return {line.partition("==")[0] for line in lines if "==" in line}


def imported(source):
    """Return the names of the packages that Python code imports, as pip spells them."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module.partition(".")[0])
    local = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]}
    modules -= {*sys.stdlib_module_names, *local, *OPTIONAL}
    return {re.sub("[-_.]+", "-", DISTRIBUTIONS[module][0]).lower() for module in modules}


def test_notebook_and_helper_import_declared_packages_only():
    sources = [cell.source for cell in CODE.values()]
    sources.append((ROOT / "vae_helpers.py").read_text())
    found = set().union(*map(imported, sources))
    assert {"tensorflow", "keras", "scikit-learn", "pillow"} <= found
    assert found <= declared(ROOT / "requirements.txt")


def test_tests_import_declared_packages_only():
    found = set().union(*(imported(path.read_text()) for path in ROOT.glob("tests/*.py")))
    names = declared(ROOT / "requirements.txt") | declared(ROOT / "tests" / "requirements.txt")
    assert found <= {name.replace("_", "-") for name in names}
