"""Values for the Helm chart: every source of bundles, and every feature."""

from __future__ import annotations

from tests.operations.kubernetes_objects import Object

HASH = "0" * 64
SOURCES: dict[str, Object] = {
    "demo": {"demo": True},
    "claim": {"claim": {"name": "shared", "path": "flux/h200"}},
    "build": {"build": {"decoder": "flux-2kto4k-v1.5", "claim": "shared", "checkpoint": "model.pth"}},
    "image": {"image": {"reference": f"registry.example/flux@sha256:{HASH}", "path": "bundle"}},
    "http": {"http": {"url": "https://files.example:8443/flux.tar.gz", "sha256": HASH}},
}
EGRESS = {"networkPolicy": {"egress": [{"ports": [{"port": 443}]}]}}
GATEWAY = {"networkPolicy": {"from": [{"namespaceSelector": {"matchLabels": {"name": "gateways"}}}]}}
FEATURES: dict[str, Object] = {
    "keys": {"apiKeys": {"keys": {"alice": "0123456789abcdef"}}},
    "captions": {"captions": {"claim": "shared", "encoder": "gemma", "prefix": "prefix.txt"}},
    "cache": {"cacheClaim": {"create": True, "storageClass": "nfs"}},
    "keda": {"autoscaling": {"kind": "keda"}, "prometheus": {"serviceMonitor": True}},
    "hpa": {"autoscaling": {"kind": "hpa"}},
    "httpRoute": {
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "retry": {"codes": [503]}},
        **GATEWAY,
    },
    "ingress": {"ingress": {"enabled": True, "hosts": ["a.example"], "tls": [{"secretName": "tls"}]}, **GATEWAY},
    "open": {"networkPolicy": {"enabled": False}},
    "prometheus": {"prometheus": {"serviceMonitor": True, "rules": True, "dashboard": True, "labels": {"a": "b"}}},
    "settings": {"settings": {"max-pixels": 16777216, "sizes": ["1024x1024", "2048x2048"], "playground": False}},
    "pods": {
        "image": {"repository": "r.example/pid", "digest": f"sha256:{HASH}", "pullSecrets": ["pull"]},
        "env": [{"name": "OTEL_SERVICE_NAME", "value": "pid"}],
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"key": "spot", "operator": "Exists"}],
        "runtimeClassName": "nvidia",
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": "25%"},
        "podLabels": {"team": "a"},
        "podAnnotations": {"a": "b"},
        "podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None},
        "priorityClassName": "high",
        "serviceAccountName": "pid",
        "fullnameOverride": "decoder",
    },
    "service": {"service": {"type": "LoadBalancer", "annotations": {"a": "b"}}, **GATEWAY},
}


def merged(*parts: Object) -> Object:
    """Return `parts` merged member by member; later ones take precedence."""
    result: Object = {}
    for part in parts:
        for name, value in part.items():
            both = isinstance(value, dict) and isinstance(result.get(name), dict)
            result[name] = merged(result[name], value) if both else value
    return result


def values(source: str = "claim", *parts: Object) -> Object:
    """Return values with one bundle, and `parts` merged over them."""
    egress = EGRESS if source == "http" else {}
    return merged({"image": {"repository": "r.example/pid"}, "bundles": {"flux": SOURCES[source]}}, egress, *parts)
