"""Which modules of a package import which, read from their sources; imports inside functions count like all others."""

import ast


def modules_below(package):
    """{module: modules of the same package that it imports}, of all files below the folder `package`."""
    paths = {name_of(path, package): path for path in package.rglob("*.py")}
    return {name: imports_of(name, path, paths) for name, path in paths.items()}


def name_of(path, package):
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(name, path, known):
    around = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = around[: len(around) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # a module, or what a module defines
                names.add(f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module)
    return {other for other in names if other in known and other != name}


def circles(imports):
    """The groups of modules that import each other, directly or through others: strongly connected components."""
    reachable = {name: reach(imports, name) for name in imports}
    groups = {frozenset(other for other in reachable[name] if name in reachable[other]) for name in imports}
    return sorted(sorted(group) for group in groups if group)


def reach(imports, start):
    """All modules that `start` comes to import, itself too if it does."""
    todo, reached = list(imports[start]), set()
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += imports[name]
    return reached
