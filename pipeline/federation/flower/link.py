"""How a SuperLink is reached, and what it means where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.supercore.error import FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufClientInterceptor

from pipeline.errors import ConfigError, NetworkError, first_line

_AWAY = (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT)

Client = TypeVar("Client", bound=ProtobufClient)


class UnreachableError(NetworkError):
    """A SuperLink does not answer; it may do so later."""


class RefusedError(NetworkError):
    """A SuperLink refuses a request; ``unknown`` if it does not know who asks."""

    def __init__(self, message: str, *, unknown: bool) -> None:
        super().__init__(message)
        self.unknown = unknown


@dataclass(frozen=True)
class Link:
    """The address of a SuperLink, and whom to trust there."""

    address: str  # host:port
    root_certificates: Path | None = None  # PEM; None: those of the public authorities
    insecure: bool = False  # without TLS

    def open(
        self, kind: type[Client], component: str, more: Sequence[ProtobufClientInterceptor] = ()
    ) -> Client:
        """Return a client of one of its APIs; nothing is sent yet.

        Raises:
            ConfigError: the address or the certificates cannot be used.
        """
        interceptors = [RuntimeVersionHttpInterceptor(component_name=component), *more]
        path = self.root_certificates
        try:
            content = None if path is None else path.read_bytes()
            return kind.from_server_address(self.address, self.insecure, content, interceptors)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{path}: no such file, expected the certificate of the authority that signed the "
                "SuperLink's, as PEM; give its path as --root-certificates"
            ) from error
        except (ValueError, httpx.InvalidURL) as error:  # ssl.SSLError is no ValueError
            raise ConfigError(f"--superlink {self.address}: {first_line(error)}") from error
        except OSError as error:  # ssl.SSLError
            raise ConfigError(
                f"{path}: found no certificate ({first_line(error)}), expected PEM; "
                "give the authority's as --root-certificates"
            ) from error

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Turn what goes wrong on the way into one line.

        Raises:
            UnreachableError: nobody answers. RefusedError: it will not. NetworkError: its
                certificate is not trusted.
        """
        try:
            yield
        except httpx.TransportError as error:
            reason = first_line(error)
            if "CERTIFICATE" in reason or "certificate" in reason:
                raise NetworkError(
                    f"SuperLink {self.address}: found a certificate that is not trusted "
                    f"({reason}), expected one signed by the authority in --root-certificates; "
                    "ask the server's administrator for its certificate"
                ) from error
            raise UnreachableError(
                f"SuperLink {self.address}: no answer ({reason}), expected a SuperLink; check "
                "the address, the network, and that it runs"
            ) from error
        except httpx.HTTPStatusError as error:
            if error.response.status_code in _AWAY:
                raise UnreachableError(
                    f"SuperLink {self.address}: the proxy before it finds none (HTTP status "
                    f"{error.response.status_code}); see that it runs"
                ) from error
            unknown = error.response.status_code == httpx.codes.UNAUTHORIZED
            line = f"SuperLink {self.address}: {_refusal(error.response)}"
            raise RefusedError(line, unknown=unknown) from error
        except httpx.InvalidURL as error:
            raise ConfigError(f"--superlink {self.address}: {first_line(error)}") from error


def _refusal(response: httpx.Response) -> str:
    """Return what a SuperLink, or what stands before it, says to a request that it refuses."""
    error = FlowerError.from_json(response.text)
    if error is None:
        return f"it refuses with HTTP status {response.status_code}; see its log"
    details = f" ({first_line(Exception(error.public_details))})" if error.public_details else ""
    return f"it refuses: {error.message}{details}"
