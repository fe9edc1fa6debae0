"""Which coroutines of the project call the file system, a process or the network without giving the
event loop away: read off the source.

A call blocks when it is one of those below, or calls a function of the project that blocks: a function
by its name, a method through `self`, `super()`, a class, or an attribute or argument whose annotation
names a class of the project. A log line calls every log handler of the project. What is handed over
as an argument (`to_thread(read, path)`) is not called here. Where a receiver is not known nothing is
found, so this sees less than there is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FUNCTIONS = {
    *("open", "print_file", "time.sleep", "sleep_now"),
    *(
        "os.open",
        "os.fsync",
        "os.write",
        "os.read",
        "os.pread",
        "os.pwrite",
        "os.fdatasync",
        "os.listdir",
        "os.replace",
        "os.rename",
        "os.stat",
        "os.statvfs",
    ),
    *("os.unlink", "os.remove", "os.makedirs", "os.mkdir", "os.walk", "os.link", "os.truncate"),
    *("os.scandir", "fcntl.flock", "tempfile.mkdtemp", "tempfile.TemporaryDirectory"),
    *("subprocess.run", "subprocess.check_output", "subprocess.check_call", "subprocess.Popen"),
    *("ray.get", "ray.wait", "ray.init", "socket.create_connection", "urllib.request.urlopen"),
}
MODULES = {"shutil"}
METHODS = {
    *("read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "rmdir", "unlink", "touch"),
    *("iterdir", "glob", "rglob", "exists", "is_file", "is_dir", "stat", "samefile", "hardlink_to"),
    *("symlink_to", "resolve", "rename"),
}
"""Of `pathlib.Path`; other classes of the project have none of these names."""
FILE = "(an open file)"
FILE_METHODS = {"write", "writelines", "read", "readline", "flush", "seek", "truncate"}
WAITS = {"Condition": {"wait", "wait_for"}, "Event": {"wait"}, "Thread": {"join"}}
"""Of threads; those of `asyncio` are only called in coroutines, where these names mean them."""
THREADS = {f"threading.{name}" for name in WAITS}
LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
LOG_FILES = {"FileHandler", "RotatingFileHandler", "TimedRotatingFileHandler", "WatchedFileHandler"}


@dataclass(frozen=True)
class Function:
    module: str
    cls: str | None
    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def where(self) -> str:
        owner = f"{self.cls}." if self.cls else ""
        return f"{self.module}:{owner}{self.name}"


@dataclass
class _Class:
    module: str
    name: str
    bases: list[str]
    methods: dict[str, Function] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)  # attribute: name of its class


@dataclass
class Source:
    """All functions and classes below `folders`, and what each module's names mean."""

    functions: dict[tuple[str, str], Function] = field(default_factory=dict)
    classes: dict[str, _Class] = field(default_factory=dict)
    imports: dict[str, dict[str, tuple[str, str | None]]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    """Functions that ask no disk and no network, whatever they call."""
    log_file: str | None = None
    """A handler of the standard library that is made somewhere, and writes where the line is logged."""
    _why: dict[str, str | None] = field(default_factory=dict)

    @classmethod
    def of(cls, *folders: str, harmless: frozenset[str] = frozenset()) -> Source:
        source = cls(harmless=harmless)
        for folder in folders:
            for path in sorted(Path(folder).rglob("*.py")):
                name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
                source.add(name, ast.parse(path.read_text()))
        return source

    def add(self, module: str, tree: ast.Module) -> None:
        names = self.imports.setdefault(module, {})
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    names[alias.asname or alias.name] = (node.module, alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    names[alias.asname or alias.name.partition(".")[0]] = (alias.name, None)
            elif isinstance(node, ast.Call):
                made = (_dotted(node.func) or "").rpartition(".")[2]
                self.log_file = made if made in LOG_FILES else self.log_file
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.functions[module, node.name] = Function(module, None, node.name, node)
            elif isinstance(node, ast.ClassDef):
                self._add_class(module, node)

    def _add_class(self, module: str, node: ast.ClassDef) -> None:
        bases = [b.value if isinstance(b, ast.Subscript) else b for b in node.bases]
        found = _Class(module, node.name, [_dotted(base) or "" for base in bases])
        for part in node.body:
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                found.methods[part.name] = Function(module, node.name, part.name, part)
                self._fields_of(part, found)
            elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                found.fields[part.target.id] = _class_in(part.annotation)
        self.classes[node.name] = found

    def _fields_of(self, method: ast.FunctionDef | ast.AsyncFunctionDef, found: _Class) -> None:
        """What `self.x = argument` and `self.x = Class(...)` say of attributes; and properties."""
        if any(_dotted(d) == "property" for d in method.decorator_list) and method.returns:
            found.fields[method.name] = _class_in(method.returns)
        known = _arguments(method)
        for node in ast.walk(method):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
                found.fields[node.target.attr] = _class_in(node.annotation)
            if not isinstance(node, ast.Assign):
                continue
            pairs = [(target, node.value) for target in node.targets]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts, strict=False))
            for target, value in pairs:
                if isinstance(target, ast.Attribute) and _dotted(target.value) == "self":
                    if isinstance(value, ast.Name) and value.id in known:
                        found.fields[target.attr] = known[value.id]
                    elif isinstance(value, ast.Call) and _opens(value):
                        found.fields[target.attr] = FILE
                    elif isinstance(value, ast.Call) and _dotted(value.func) in THREADS:
                        found.fields[target.attr] = _class_in(value.func)
                    elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
                        found.fields.setdefault(target.attr, value.func.id)

    def why_blocking(self, function: Function) -> str | None:
        """The chain of calls that ends in a blocking one, or None."""
        if function.where in self.harmless:
            return None
        if function.where in self._why:
            return self._why[function.where]
        self._why[function.where] = None  # while it is looked at: a circle
        for call in _calls(function.node):
            reason = self._reason(function, call)
            if reason is not None:
                self._why[function.where] = reason
                break
        return self._why[function.where]

    def blocking_coroutines(self) -> Iterator[tuple[str, str]]:
        owned = [f for c in self.classes.values() for f in c.methods.values()]
        for function in (*self.functions.values(), *owned):
            if isinstance(function.node, ast.AsyncFunctionDef):
                for call in _calls(function.node):
                    reason = self._reason(function, call)
                    if reason is not None:
                        yield function.where, f"line {call.lineno}: {reason}"

    def _reason(self, function: Function, call: ast.Call) -> str | None:
        name = _dotted(call.func) or ""
        full = self._full(function.module, name)
        if full in FUNCTIONS or full.partition(".")[0] in MODULES:
            return name
        if reason := self._of_threads_and_files(function, call) or self._of_log(name):
            return reason
        target = self._target(function, call)
        of_path = isinstance(call.func, ast.Attribute) and call.func.attr in METHODS
        if of_path and target is None and not name.startswith(("re.", "asyncio.")):
            return f".{ast.unparse(call.func).rpartition('.')[2]}"
        for found in () if target is None else self._bodies(target):
            if isinstance(found.node, ast.AsyncFunctionDef):
                continue
            reason = self.why_blocking(found)
            if reason is not None:
                return f"{found.name} > {reason}"
        return None

    def _of_threads_and_files(self, function: Function, call: ast.Call) -> str | None:
        if not isinstance(call.func, ast.Attribute):
            return None
        cls, method = self._class_of(function, call.func.value), call.func.attr
        if cls == FILE and method in FILE_METHODS:
            return f"file.{method}"
        is_sync = isinstance(function.node, ast.FunctionDef)
        if is_sync and cls not in self.classes and method in WAITS.get(cls or "", ()):
            return f"{cls}.{method}"
        return None

    def _of_log(self, name: str) -> str | None:
        """What blocks in a handler of the project that a log line may meet."""
        owner, _, method = name.rpartition(".")
        if owner not in ("log", "logging") or method not in LOG_METHODS:
            return None
        if self.log_file is not None:
            return f"{method} > {self.log_file}"
        for cls in self.classes.values():
            if not any(base.endswith("Handler") for base in cls.bases):
                continue
            for step in ("emit", "enqueue", "prepare"):
                body = cls.methods.get(step)
                if body is not None and (reason := self.why_blocking(body)):
                    return f"{method} > {step} > {reason}"
        return None

    def _bodies(self, target: Function) -> list[Function]:
        """The function itself; of a protocol's, those of the classes that have all its methods."""
        protocol = self.classes.get(target.cls or "")
        if protocol is None or "Protocol" not in protocol.bases:
            return [target]
        return [
            other.methods[target.name]
            for other in self.classes.values()
            if other is not protocol
            and target.name in other.methods
            and all(self._method(other.name, name) for name in protocol.methods)
        ]

    def _full(self, module: str, name: str) -> str:
        first, _, rest = name.partition(".")
        where = self.imports[module].get(first)
        if where is None:
            return name
        base = where[0] if where[1] is None else f"{where[0]}.{where[1]}"
        return f"{base}.{rest}" if rest else base

    def _target(self, function: Function, call: ast.Call) -> Function | None:
        if isinstance(call.func, ast.Name):
            return self._named(function.module, call.func.id)
        if not isinstance(call.func, ast.Attribute):
            return None
        method, receiver = call.func.attr, call.func.value
        if isinstance(receiver, ast.Call) and _dotted(receiver.func) == "super":
            owner = self.classes.get(function.cls or "")
            found = (self._method(base, method) for base in (owner.bases if owner else ()))
            return next(filter(None, found), None)
        module = self._full(function.module, _dotted(receiver) or "")
        if (module, method) in self.functions:
            return self.functions[module, method]
        cls = self._class_of(function, receiver)
        return None if cls is None else self._method(cls, method)

    def _named(self, module: str, name: str) -> Function | None:
        where = self.imports[module].get(name)
        for _ in range(4):  # through packages that pass names on
            if where is None or where[1] is None:
                break
            if where in self.functions:
                return self.functions[where[0], where[1]]
            if where[1] in self.classes:
                return self._method(where[1], "__init__")
            where = self.imports.get(where[0], {}).get(where[1])
        if (module, name) in self.functions:
            return self.functions[module, name]
        return self._method(name, "__init__") if name in self.classes else None

    def _class_of(self, function: Function, receiver: ast.expr) -> str | None:
        if isinstance(receiver, ast.Name):
            if receiver.id in ("self", "cls"):
                return function.cls
            alias = _aliases(function.node).get(receiver.id)
            if alias is not None:
                return self._class_of(function, alias)
            known = _arguments(function.node) | _locals(function.node)
            return known.get(receiver.id, receiver.id if receiver.id in self.classes else None)
        if isinstance(receiver, ast.Attribute):
            owner = self._class_of(function, receiver.value)
            return None if owner is None else self._field(owner, receiver.attr)
        return None

    def _field(self, cls: str, name: str) -> str | None:
        owner = self.classes.get(cls)
        if owner is None:
            return None
        found = (self._field(base.rpartition(".")[2], name) for base in owner.bases)
        return owner.fields.get(name) or next(filter(None, found), None)

    def _method(self, cls: str, name: str) -> Function | None:
        owner = self.classes.get(cls.rpartition(".")[2])
        if owner is None:
            return None
        found = (self._method(base, name) for base in owner.bases)
        return owner.methods.get(name) or next(filter(None, found), None)


def _calls(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.Call]:
    """The calls that running the function makes, without those of functions defined in it."""
    open_nodes: list[ast.AST] = list(function.body)
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Call):
            yield node
        open_nodes.extend(ast.iter_child_nodes(node))


def _opens(call: ast.Call) -> bool:
    """`open(...)`, or `path.open(...)` of a variable; not `Class.open(...)`."""
    name = _dotted(call.func) or ""
    owner, _, method = name.rpartition(".")
    return method == "open" and owner != "os" and not owner.rpartition(".")[2][:1].isupper()


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return None if base is None else f"{base}.{node.attr}"
    return None


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str]:
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return {a.arg: _class_in(a.annotation) for a in given if a.annotation is not None}


def _locals(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str]:
    found = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            name = _dotted(node.value.func)
            for target in node.targets:
                if name and isinstance(target, ast.Name):
                    found[target.id] = name.rpartition(".")[2]
    return found


def _aliases(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, ast.expr]:
    """Local names of attributes, such as `place` after `place = self.place`."""
    found: dict[str, ast.expr] = {}
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        left, right = node.targets[0], node.value
        pairs = [(left, right)]
        if isinstance(left, ast.Tuple) and isinstance(right, ast.Tuple):
            pairs = list(zip(left.elts, right.elts, strict=False))
        for target, value in pairs:
            if isinstance(target, ast.Name) and isinstance(value, ast.Attribute):
                found[target.id] = value
    return found


def _class_in(annotation: ast.expr) -> str:
    """The first name of an annotation that is none of typing's: `Checkpoints | None` is Checkpoints."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp):
        return _class_in(annotation.left)
    if isinstance(annotation, ast.Subscript):
        return _class_in(annotation.value)
    return (_dotted(annotation) or "").rpartition(".")[2]
