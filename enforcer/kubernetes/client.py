"""Requests to the Kubernetes API: ``kubernetes`` gives configuration, credentials and transport, and no bodies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import urllib3
from kubernetes import config as kubernetes_config
from kubernetes.client import ApiClient, Configuration

from enforcer.model.sources import SourceError

_CONNECT_SECONDS = 5.0
_MAX_RETRY_AFTER_SECONDS = 30.0
# A watch for each of four kinds, policies that are read again, a request beside them, and Events.
_CONNECTIONS = 7


class StatusError(Exception):
    """The server answered with an error: its HTTP code and, for people, its words.

    ``retry_after`` is in seconds, 0 where the server named none.
    """

    def __init__(self, code: int, text: str, retry_after: float = 0.0) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.retry_after = retry_after


class _Status(msgspec.Struct, frozen=True):
    message: str = ""


_status = msgspec.json.Decoder(_Status)


def connect(kubeconfig: Path | None) -> ApiClient:
    """A client of the API: of a kubeconfig, or (None) of the cluster that this process is a pod of.

    Raises:
        SourceError: there is no such configuration.
    """
    configuration = Configuration()
    try:
        if kubeconfig is None:
            kubernetes_config.load_incluster_config(client_configuration=configuration)
        else:
            kubernetes_config.load_kube_config(str(kubeconfig), client_configuration=configuration)
    except Exception as error:
        # A file that is no kubeconfig makes the library raise what it may.
        where = "this pod's service account" if kubeconfig is None else str(kubeconfig)
        reason = str(error).rstrip(".")
        raise SourceError(f"no Kubernetes API by {where}: {reason}; give --kubeconfig or --source") from error
    configuration.connection_pool_maxsize = _CONNECTIONS
    return ApiClient(configuration)


def request(
    api: ApiClient,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    read_seconds: float,
) -> urllib3.BaseHTTPResponse:
    """Begin a request; the response, whose body has not been read, is to be closed. ``path`` may end with a query.

    Raises:
        StatusError: the server refused.
        urllib3.exceptions.HTTPError: it could not be reached.
    """
    # Credentials are asked for at each request: a service account's token is another every hour.
    _, url, own, *_ = api.param_serialize(
        method,
        path,
        header_params={"Accept": "application/json", **(headers or {})},
        auth_settings=["BearerToken"],
    )
    timeout = urllib3.Timeout(connect=_CONNECT_SECONDS, read=read_seconds)
    response: urllib3.BaseHTTPResponse = api.rest_client.pool_manager.request(
        method, url, headers=own, body=body, timeout=timeout, retries=False, preload_content=False
    )
    if response.status in {200, 201}:
        return response
    with response:
        try:
            message = _status.decode(response.data).message
        except msgspec.MsgspecError:
            message = response.reason or "no reason given"
        raise StatusError(response.status, message, _seconds(response.headers.get("Retry-After")))


def _seconds(text: str | None) -> float:
    """A Retry-After in seconds; 0 for none, or for a date."""
    return min(float(text), _MAX_RETRY_AFTER_SECONDS) if text and text.isdecimal() else 0.0
