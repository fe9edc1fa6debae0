"""Write what custom resource definitions allow, as JSON schemas that refuse every other field.

kubectl get crd rayclusters.ray.io rayjobs.ray.io podmonitors.monitoring.coreos.com -o yaml > crds.yaml
python deploy/crd.py crds.yaml --source "KubeRay 1.6"

Kubernetes drops a field that a definition does not know and says nothing, so nobody sees a misspelt one
on a cluster. The schemas, one a kind in deploy/kuberay/schema, close every object that names its
properties; only one under `x-kubernetes-preserve-unknown-fields` stays open. They keep names, types,
enumerations, bounds and patterns; parts that come more than once stand under `$defs`. Tests hold the
files of deploy/kuberay against them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).resolve().parent / "kuberay" / "schema"
KEPT = ("type", "required", "enum", "pattern", "minimum", "maximum", "minItems", "maxItems")
KEPT += ("minLength", "maxLength")
SHARED = 200  # characters of a part from which on it is worth a name

Schema = dict[str, Any]
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA: Schema = {  # the API server's own: a definition says no more than that it is an object
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 63},
        "namespace": {"type": "string"},
        "labels": TEXTS,
        "annotations": TEXTS,
    },
    "required": ["name"],
    "additionalProperties": False,
}


def schemas(text: str, source: str) -> dict[str, Schema]:
    """By kind, for the stored version of each definition in a YAML text, a `List` of them included.

    Raises `ValueError` for a document that is no definition with a schema.
    """
    return dict(_of(crd, source) for crd in _definitions(text))


def closed(part: Schema) -> Schema:
    """`part` of a structural schema, without prose, refusing properties that it does not name."""
    if part.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"], **_kept(part, ("pattern",))}
    found = _kept(part, KEPT)
    if part.get("nullable"):
        found["type"] = [part["type"], "null"]
    if "items" in part:
        found["items"] = closed(part["items"])
    if isinstance(part.get("additionalProperties"), dict):
        found["additionalProperties"] = closed(part["additionalProperties"])
    elif "properties" in part:
        found["properties"] = {n: closed(p) for n, p in part["properties"].items()}
        if not part.get("x-kubernetes-preserve-unknown-fields"):
            found["additionalProperties"] = False
    return found


def _definitions(text: str) -> Iterator[Schema]:
    for document in yaml.safe_load_all(text):
        yield from document["items"] if document.get("kind") == "List" else [document]


def _of(crd: Schema, source: str) -> tuple[str, Schema]:
    try:
        spec = crd["spec"]
        (version,) = [each for each in spec["versions"] if each["storage"]]
        whole = closed(version["schema"]["openAPIV3Schema"])
        kind, group = spec["names"]["kind"], spec["group"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"no definition with one stored version and its schema ({error!r}): give what `kubectl "
            "get crd NAME -o yaml` prints"
        ) from error
    name = "/".join(filter(None, (group, version["name"])))
    whole["properties"] |= {
        "apiVersion": {"const": name},
        "kind": {"const": kind},
        "metadata": METADATA,
    }
    whole["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return kind, {"$comment": source, **_named(whole)}


def _named(whole: Schema) -> Schema:
    """With the long parts that come more than once under `$defs`."""
    counts = Counter(_text(part) for part in _objects(whole))
    names: dict[str, str] = {}
    for text in sorted((t for t, n in counts.items() if n > 1 and len(t) > SHARED), key=len):
        names[text] = str(len(names))
    defs = {name: _replaced(json.loads(text), names, text) for text, name in names.items()}
    return {**_replaced(whole, names, ""), "$defs": defs}


def _objects(part: Any) -> Iterator[Schema]:
    """Every schema of an object within `part`, itself included."""
    for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _objects(each)
    if isinstance(part, dict) and part.get("type") == "object":
        yield part


def _replaced(part: Any, names: dict[str, str], own: str) -> Any:
    if isinstance(part, list):
        return [_replaced(each, names, own) for each in part]
    if not isinstance(part, dict):
        return part
    text = _text(part)
    if text != own and text in names:
        return {"$ref": f"#/$defs/{names[text]}"}
    return {key: _replaced(value, names, own) for key, value in part.items()}


def _written(schema: Schema) -> str:
    """As JSON, a named part a line."""
    shared = ",\n".join(f'"{name}": {_text(part)}' for name, part in schema["$defs"].items())
    rest = _text({key: value for key, value in schema.items() if key != "$defs"})
    return f'{rest[:-1]},\n"$defs": {{\n{shared}\n}}}}\n'


def _kept(part: Schema, keys: tuple[str, ...]) -> Schema:
    return {key: part[key] for key in keys if key in part}


def _text(part: Any) -> str:
    return json.dumps(part, sort_keys=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--source", required=True, help="of which version, for whom reads a schema")
    arguments = parser.parse_args()
    SCHEMAS.mkdir(exist_ok=True)
    for path in arguments.files:
        for kind, schema in schemas(path.read_text(), arguments.source).items():
            (SCHEMAS / f"{kind}.json").write_text(_written(schema))
    return 0


if __name__ == "__main__":
    sys.exit(main())
