"""Fields of what deploy/kuberay asks for, as JSON schemas that refuse any other.

Written by hand from the public references, for the fields that we use and some beside them: KubeRay's
API reference of ray.io/v1 (https://ray-project.github.io/kuberay/reference/api/), Kubernetes' of
core/v1, and the Prometheus operator's of monitoring.coreos.com/v1. They find a misspelt field, a field
in the wrong place and a value of the wrong type; they are not the whole of the CRDs.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
QUANTITY: Schema = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"},
    ]
}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 63}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}


def record(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


def several(item: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": item, "minItems": least}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


METADATA = record(("name",), name=NAME, namespace=NAME, labels=STRINGS, annotations=STRINGS)
RESOURCES = record(
    limits={"type": "object", "additionalProperties": QUANTITY},
    requests={"type": "object", "additionalProperties": QUANTITY},
)
CONTAINER = record(
    ("name", "image"),
    name=NAME,
    image=STRING,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    command=several(STRING),
    args=several(STRING),
    env=several(record(("name",), name=STRING, value=STRING, valueFrom={"type": "object"})),
    ports=several(
        record(
            ("containerPort",),
            name={"type": "string", "pattern": "^[a-z0-9-]{1,15}$"},
            containerPort={"type": "integer", "minimum": 1, "maximum": 65535},
            protocol=one_of("TCP", "UDP"),
        )
    ),
    resources=RESOURCES,
    securityContext=record(
        allowPrivilegeEscalation=BOOLEAN,
        capabilities=record(add=several(STRING), drop=several(STRING)),
        privileged=BOOLEAN,
        readOnlyRootFilesystem=BOOLEAN,
        runAsNonRoot=BOOLEAN,
        runAsUser=COUNT,
        runAsGroup=COUNT,
    ),
    volumeMounts=several(
        record(("name", "mountPath"), name=NAME, mountPath=STRING, readOnly=BOOLEAN, subPath=STRING)
    ),
)
VOLUME = record(
    ("name",),
    name=NAME,
    emptyDir=record(medium=one_of("", "Memory"), sizeLimit=QUANTITY),
    persistentVolumeClaim=record(("claimName",), claimName=NAME, readOnly=BOOLEAN),
)
POD_TEMPLATE = record(
    ("spec",),
    metadata=record(labels=STRINGS, annotations=STRINGS),
    spec=record(
        ("containers",),
        automountServiceAccountToken=BOOLEAN,
        containers=several(CONTAINER, least=1),
        initContainers=several(CONTAINER),
        nodeSelector=STRINGS,
        priorityClassName=STRING,
        restartPolicy=one_of("Always", "OnFailure", "Never"),
        securityContext=record(
            fsGroup=COUNT,
            fsGroupChangePolicy=one_of("OnRootMismatch", "Always"),
            runAsNonRoot=BOOLEAN,
            runAsUser=COUNT,
            runAsGroup=COUNT,
        ),
        serviceAccountName=NAME,
        terminationGracePeriodSeconds=COUNT,
        tolerations=several({"type": "object"}),
        volumes=several(VOLUME),
    ),
)
START_PARAMS = STRINGS
CLUSTER_SPEC = record(
    ("headGroupSpec",),
    authOptions=record(mode=one_of("token", "disabled"), secretName=NAME),
    autoscalerOptions=record(
        env=several({"type": "object"}),
        idleTimeoutSeconds=COUNT,
        image=STRING,
        imagePullPolicy=STRING,
        resources=RESOURCES,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        version=one_of("v1", "v2"),
    ),
    enableInTreeAutoscaling=BOOLEAN,
    headGroupSpec=record(
        ("rayStartParams", "template"),
        enableIngress=BOOLEAN,
        rayStartParams=START_PARAMS,
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
        template=POD_TEMPLATE,
    ),
    managedBy=STRING,
    rayVersion=STRING,
    suspend=BOOLEAN,
    workerGroupSpecs=several(
        record(
            ("groupName", "rayStartParams", "template"),
            groupName=NAME,
            idleTimeoutSeconds=COUNT,
            maxReplicas=COUNT,
            minReplicas=COUNT,
            numOfHosts=COUNT,
            rayStartParams=START_PARAMS,
            replicas=COUNT,
            suspend=BOOLEAN,
            template=POD_TEMPLATE,
        )
    ),
)
JOB_SPEC = record(
    ("entrypoint",),
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    clusterSelector=STRINGS,
    entrypoint=STRING,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=STRING,
    jobId=STRING,
    managedBy=STRING,
    metadata=STRINGS,
    rayClusterSpec=CLUSTER_SPEC,
    runtimeEnvYAML=STRING,
    shutdownAfterJobFinishes=BOOLEAN,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode"),
    submitterConfig=record(backoffLimit=COUNT),
    submitterPodTemplate=POD_TEMPLATE,
    suspend=BOOLEAN,
    ttlSecondsAfterFinished=COUNT,
)
POD_MONITOR_SPEC = record(
    ("selector", "podMetricsEndpoints"),
    namespaceSelector=record(any=BOOLEAN, matchNames=several(NAME)),
    podMetricsEndpoints=several(
        record(
            ("port",),
            interval={"type": "string", "pattern": r"^\d+(ms|s|m|h)$"},
            path=STRING,
            port=STRING,
            relabelings=several(
                record(
                    action=one_of("replace", "keep", "drop", "labelmap"),
                    regex=STRING,
                    replacement=STRING,
                    sourceLabels=several(STRING),
                    targetLabel=STRING,
                )
            ),
            scrapeTimeout=STRING,
        ),
        least=1,
    ),
    selector=record(matchLabels=STRINGS),
)
CLAIM_SPEC = record(
    ("accessModes", "resources"),
    accessModes=several(one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"), least=1),
    resources=RESOURCES,
    storageClassName=STRING,
    volumeName=STRING,
)


def _object(api_version: str, kind: str, spec: Schema) -> Schema:
    return record(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )


KINDS: dict[str, Schema] = {
    "RayCluster": _object("ray.io/v1", "RayCluster", CLUSTER_SPEC),
    "RayJob": _object("ray.io/v1", "RayJob", JOB_SPEC),
    "PodMonitor": _object("monitoring.coreos.com/v1", "PodMonitor", POD_MONITOR_SPEC),
    "PersistentVolumeClaim": _object("v1", "PersistentVolumeClaim", CLAIM_SPEC),
    "Kustomization": record(
        ("apiVersion", "kind", "resources"),
        apiVersion={"const": "kustomize.config.k8s.io/v1beta1"},
        kind={"const": "Kustomization"},
        resources=several(STRING, least=1),
        namespace=NAME,
        images=several(record(("name",), name=STRING, newName=STRING, newTag=STRING)),
    ),
}
