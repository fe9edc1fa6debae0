"""What is wrong with a Kubernetes document, by the schema of its kind in deploy/kuberay/schema.

Made from custom resource definitions by deploy/crd.py; each says in `$comment` of which version. A
kustomization is read by a tool and has no definition; its fields stand here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

KUBERAY = Path("deploy/kuberay")
TEXT = {"type": "string"}
KUSTOMIZATION = {
    "type": "object",
    "properties": {
        "apiVersion": {"const": "kustomize.config.k8s.io/v1beta1"},
        "kind": {"const": "Kustomization"},
        "resources": {"type": "array", "items": TEXT, "minItems": 1},
        "images": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": TEXT, "newName": TEXT, "newTag": TEXT},
                "required": ["name"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["apiVersion", "kind", "resources"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    path.stem: json.loads(path.read_text()) for path in sorted(KUBERAY.glob("schema/*.json"))
}
VALIDATORS = {
    kind: jsonschema.Draft202012Validator(schema)
    for kind, schema in (SCHEMAS | {"Kustomization": KUSTOMIZATION}).items()
}


def faults(document: dict[str, Any]) -> list[str]:
    found = VALIDATORS[document["kind"]].iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]
