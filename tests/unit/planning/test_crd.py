"""deploy/crd.py: from a definition as Kubernetes prints it to a schema that refuses what it drops."""

import importlib.util
from pathlib import Path

import jsonschema
import pytest
import yaml

spec = importlib.util.spec_from_file_location("crd", Path("deploy/crd.py"))
assert spec is not None
assert spec.loader is not None
crd = importlib.util.module_from_spec(spec)
spec.loader.exec_module(crd)

POD = {
    "type": "object",
    "description": "prose",
    "required": ["image"],
    "properties": {
        "image": {"type": "string", "description": "prose"},
        "policy": {"type": "string", "enum": ["Always", "Never"], "default": "Always"},
        "cpu": {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": "^[0-9]+m?$",
            "x-kubernetes-int-or-string": True,
        },
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "note": {"type": "string", "nullable": True},
        "properties": {"type": "array", "items": {"type": "object", "properties": {"type": {}}}},
    },
}
WHOLE = {
    "type": "object",
    "properties": {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "properties": {
                "head": POD,
                "workers": {"type": "array", "items": POD},
                "open": {
                    "type": "object",
                    "properties": {"known": {"type": "integer"}},
                    "x-kubernetes-preserve-unknown-fields": True,
                },
            },
        },
    },
}


def definition(**version):
    old = {"name": "v1alpha1", "storage": False, "schema": {"openAPIV3Schema": {}}}
    new = {"name": "v1", "storage": True, "schema": {"openAPIV3Schema": WHOLE}} | version
    spec = {"group": "a.io", "names": {"kind": "Thing"}, "versions": [old, new]}
    return {"kind": "CustomResourceDefinition", "spec": spec}


def faults(**fields):
    text = yaml.safe_dump({"kind": "List", "items": [definition()]})
    schema = crd.schemas(text, "a test")["Thing"]
    jsonschema.Draft202012Validator.check_schema(schema)
    document = {"apiVersion": "a.io/v1", "kind": "Thing", "metadata": {"name": "one"}}
    found = jsonschema.Draft202012Validator(schema).iter_errors(document | {"spec": fields})
    return [f"{error.json_path}: {error.message}" for error in found]


def test_what_the_definition_allows_is_allowed():
    head = {"image": "a", "policy": "Never", "cpu": 2, "labels": {"any": "text"}, "note": None}
    head["properties"] = [{"type": "x"}]
    workers = [{"image": "b", "cpu": "500m"}]
    assert faults(head=head, workers=workers, open={"known": 1, "more": [2]}) == []


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"hed": {}}, "$.spec: Additional properties are not allowed ('hed' was unexpected)"),
        ({"workers": [{"image": "a", "imgae": "b"}]}, "$.spec.workers[0]: Additional properties"),
        ({"workers": [{}]}, "$.spec.workers[0]: 'image' is a required property"),
        ({"head": {"image": "a", "cpu": "half"}}, "$.spec.head.cpu: 'half' does not match"),
        ({"head": {"image": "a", "policy": "x"}}, "$.spec.head.policy: 'x' is not one of"),
        ({"head": {"image": "a", "labels": {"b": 1}}}, "$.spec.head.labels.b: 1 is not of type"),
        ({"open": {"known": "a"}}, "$.spec.open.known: 'a' is not of type 'integer'"),
    ],
)
def test_what_kubernetes_would_drop_or_refuse_is_named(fields, fault):
    assert any(found.startswith(fault) for found in faults(**fields)), faults(**fields)


def test_a_part_that_comes_twice_is_written_once_and_without_prose():
    schema = crd.schemas(yaml.safe_dump(definition()), "KubeRay 9")["Thing"]
    assert schema["$comment"] == "KubeRay 9"
    assert len(schema["$defs"]) == 1
    assert crd._written(schema).count('"policy"') == 1
    assert "prose" not in crd._written(schema)
    assert yaml.safe_load(crd._written(schema)) == schema


def test_what_is_no_definition_is_refused():
    with pytest.raises(ValueError, match="no definition with one stored version"):
        crd.schemas("kind: Pod\n", "a test")
    with pytest.raises(ValueError, match="no definition with one stored version"):
        crd.schemas(yaml.safe_dump(definition(storage=False)), "a test")
