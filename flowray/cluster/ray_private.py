"""What flowray uses of Ray without Ray's promise to keep it, all of it here: the next version may
have moved it. Each is imported when it is first asked for, as some load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

HEAD = "node:__internal_head__"  # the resource that Ray gives the head's node alone

# name here -> module, or module:attribute
PLACES = {
    "services": "ray._private.services",
    "utils": "ray._private.utils",
    "psutil": "ray._private.services:psutil",  # Ray has its own copy
    "dashboard_url": "ray._private.worker:get_dashboard_url",
    "gcs_channel": "ray._private.gcs_utils:create_gcs_channel",
    "gcs_messages": "ray.core.generated.gcs_service_pb2",
    "gcs_stubs": "ray.core.generated.gcs_service_pb2_grpc",
    "token_setup": "ray._private.authentication.authentication_token_setup",
    "token_headers": "ray._private.authentication.http_token_authentication"
    ":get_auth_headers_if_auth_enabled",
    "TokenLoader": "ray._raylet:AuthenticationTokenLoader",
    "kuberay_config": "ray.autoscaler._private.kuberay.autoscaling_config"
    ":_derive_autoscaling_config_from_ray_cr",
    "KubernetesClient": "ray.autoscaler._private.kuberay.node_provider:KubernetesHttpApiClient",
    "TorchBackend": "ray.train.torch.config:_TorchBackend",
    "UserError": "ray.train.v2._internal.exceptions:UserExceptionWithTraceback",
    "StartTimeout": "ray.train.v2._internal.exceptions:WorkerGroupStartupTimeoutError",
    "train_context": "ray.train.v2._internal.execution.context:get_train_context",
    "HealthCheckFailed": "ray.train.v2._internal.exceptions:WorkerHealthCheckFailedError",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = PLACES[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def cause_of(error: BaseException) -> BaseException:
    """What the user's code raised, of an error in which Ray has wrapped it."""
    if isinstance(error, __getattr__("UserError")):
        return error._base_exc
    return carried(error) or error


def carried(error: BaseException) -> BaseException | None:
    """The error that one of Ray's tasks, or its controller of a training, holds as its reason."""
    found: BaseException | None = getattr(error, "cause", None)
    return found or getattr(error, "controller_failure", None)
