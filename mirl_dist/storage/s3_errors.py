"""S3 addresses, the rights that each request needs, and the conversion of boto3's errors to StorageError.

Messages contain only error codes, exception types and hosts. Texts of a server or of botocore may contain credentials.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from mirl_dist.storage.base import NotFound, Options, Rejected, StorageError, Unavailable

CHECK_SERVER = "Check the server and the network; nothing is half-written."


class AlreadyExists(Rejected):
    """A conditional put failed because the name exists."""


class RangePastEnd(Rejected):
    """The range starts at or past the end of the object."""


class NoSuchUpload(Rejected):
    """The multipart upload does not exist: it was completed, aborted, or never started."""


class AccessDenied(Rejected):
    """The credentials lack the rights, or the server does not support the request."""


class NotSupported(AccessDenied):
    """The server does not implement the request."""


class BareNotFound(NotFound):
    """A 404 without a reason: the object or the bucket is missing, or the server is not an S3 server."""


class RequiredRights(NamedTuple):
    """The IAM actions that a request needs, and on which resource."""

    rights: str
    on: str = "it"


READ = RequiredRights("s3:GetObject (and s3:ListBucket)")
WRITE = RequiredRights("s3:PutObject")
WRITE_WITH_KEY = RequiredRights("s3:PutObject (and kms:GenerateDataKey and kms:Decrypt of the key)")
REMOVE = RequiredRights("s3:DeleteObject")
LIST = RequiredRights("s3:ListBucket", "the bucket")
LIST_UPLOADS = RequiredRights("s3:ListBucketMultipartUploads", "the bucket")
ABORT = RequiredRights("s3:AbortMultipartUpload")


_ERROR_TYPES = {
    "PreconditionFailed": AlreadyExists,
    "InvalidRange": RangePastEnd,
    "416": RangePastEnd,
    "NoSuchUpload": NoSuchUpload,
}

# Transient codes with a status below 500: load, concurrent writers, a body damaged in transit.
_TRANSIENT_CODE = re.compile(
    "BadDigest|ConditionalRequestConflict|IncompleteBody|OperationAborted|RequestLimitExceeded|RequestTimeTooSkewed|"
    "RequestTimeout|SlowDown|Throttling|ThrottlingException|TooManyRequests|XAmzContentSHA256Mismatch"
)

_CONNECTION_FAILURES = {
    "ConnectTimeoutError": "does not answer",
    "EndpointConnectionError": "cannot be reached",
    "ReadTimeoutError": "fell silent",
}
_KEYS = "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile."
_RENEW = "Renew the credentials: they have expired."
_REGION = "Set AWS_DEFAULT_REGION (or the profile's region) to the bucket's, and check the endpoint."
_ENDPOINT = "the endpoint (store.endpoint or AWS_ENDPOINT_URL_S3)"
_REMEDIES = {
    "AuthorizationHeaderMalformed": _REGION,
    "ExpiredToken": _RENEW,
    "IllegalLocationConstraintException": _REGION,
    "InvalidAccessKeyId": _KEYS,
    "InvalidBucketName": "Correct the bucket's name.",
    "InvalidRequest": "Check the endpoint, and store.encryption if it is set: some servers require https for it.",
    "InvalidToken": _RENEW,
    "KeyTooLongError": "Choose a shorter prefix.",
    "PermanentRedirect": _REGION,
    "QuotaExceeded": "Make room, or ask for a larger quota.",
    "RequestTimeTooSkewed": "Set this machine's clock.",
    "SignatureDoesNotMatch": _KEYS,
    "TokenRefreshRequired": _RENEW,
}


def parse_address(url: str) -> tuple[str, str]:
    """Return bucket and prefix of an `s3://` address. Raise Rejected for any other text, without quoting it."""
    match = re.fullmatch(r"s3://([A-Za-z0-9._-]{3,255})(/[^?#]*)?", url)
    if match is None:
        raise Rejected(
            "An address of S3 is s3://bucket/prefix, without '?', '#' or keys; this one is not. Credentials belong in "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile, the server in AWS_ENDPOINT_URL_S3."
        )
    return match[1], (match[2] or "").strip("/")


def writer_metadata() -> dict[str, Any]:
    """Return metadata that identifies this write, to recognize it if the response is lost."""
    return {"Metadata": {"writer": uuid.uuid4().hex}}


def encryption_arguments(options: Options) -> tuple[RequiredRights, dict[str, str]]:
    """Return the rights that a write needs, and its encryption arguments for boto3."""
    arguments = {"ServerSideEncryption": options.encryption, "SSEKMSKeyId": options.kms_key}
    needs = WRITE_WITH_KEY if options.encryption == "aws:kms" else WRITE
    return needs, {name: value for name, value in arguments.items() if value is not None}


@contextmanager
def map_errors(location: str, needs: RequiredRights, server: Callable[[], str] = str) -> Iterator[None]:
    """Convert errors of boto3 in the block to StorageError.

    needs: the rights that a refusal's message names. server: returns the host of the endpoint, which a proxy's error
    lacks.
    """
    from botocore import exceptions as known
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    passing = (
        known.HTTPClientError,
        known.ConnectionError,
        known.IncompleteReadError,
        known.ChecksumError,
        known.FlexibleChecksumError,
        known.MetadataRetrievalError,
        known.PaginationError,
        ResponseParserError,
        HTTPError,  # from reading the body, where botocore does not wrap it
    )
    no_keys = (known.NoCredentialsError, known.PartialCredentialsError, known.CredentialRetrievalError)
    try:
        yield
    except known.ClientError as error:
        raise _error_of_response(location, needs, error.response) from error
    except RecursionError as error:  # botocore looks up the region endlessly if a server only redirects
        raise Rejected(f"{location}: the server redirects without saying where to. {_REGION}") from error
    except passing as error:
        if (refusal := _fault_of_settings(error, server)) is not None:
            raise Rejected(f"{location}: {_host_of_error(error)} {refusal}") from error
        failure = _CONNECTION_FAILURES.get(type(error).__name__, f"broke the transfer ({type(error).__name__})")
        raise Unavailable(f"{location}: {_host_of_error(error)} {failure}. {CHECK_SERVER}") from error
    except no_keys as error:
        text = f"{location}: no usable credentials were found."
        raise Rejected(f"{text} Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.") from error
    except known.ProfileNotFound as error:
        text = f"{location}: there is no profile '{error.kwargs.get('profile')}' in the AWS files of this machine."
        raise Rejected(f"{text} Correct AWS_PROFILE, or unset it.") from error
    except known.BotoCoreError as error:
        text = f"{location}: {type(error).__name__}. Correct the address, or the AWS settings of this machine."
        raise Rejected(text) from error


def _fault_of_settings(error: Exception, server: Callable[[], str]) -> str | None:
    """Return what is wrong and what to do, for a failed connection that no waiting can mend; otherwise None."""
    from botocore import exceptions as known

    if isinstance(error, known.SSLError):
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return "shows a certificate that is not trusted. Set AWS_CA_BUNDLE to its authority's."
        if re.search("WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|HTTP_REQUEST", str(error)):
            return f"does not speak TLS on this port. Write http:// in {_ENDPOINT}, or the port of https."
    if isinstance(error, known.ProxyConnectionError):
        return _fault_of_proxy(error, server())
    host = _host_of_error(error).partition(":")[0]
    region = re.fullmatch(r"(?:.+\.)?s3[.-]([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?", host)
    is_name = region is not None and region[1] not in ("accelerate", "external-1")
    if isinstance(error, known.EndpointConnectionError) and region and is_name and not _is_region(region[1]):
        return f"is not known: is there a region '{region[1]}'? {_REGION}"
    return None


def _fault_of_proxy(error: Exception, server: str) -> str | None:
    """Return what is wrong with the proxy to `server`, and what to do; None if it may come back."""
    kwargs = getattr(error, "kwargs", {})
    proxy = urlsplit(str(kwargs.get("proxy_url", "")))
    through = f"on {server} is asked for through the proxy {proxy.hostname}:{proxy.port} (HTTP_PROXY or HTTPS_PROXY), "
    if re.fullmatch(r"localhost|127\..*|::1", server):
        return f"{through}which is not there. Add {server} to NO_PROXY."
    if refused := re.search(r"Tunnel connection failed: (4\d\d|501)\b", str(kwargs.get("error", ""))):
        return f"{through}which refuses that (HTTP {refused[1]}). Correct the proxy, or add {server} to NO_PROXY."
    return None


def _is_region(name: str) -> bool:
    """Whether this botocore knows a region of S3."""
    import boto3.session

    session = boto3.session.Session()
    partitions = session.get_available_partitions()
    return any(name in session.get_available_regions("s3", partition) for partition in partitions)


def _error_of_response(location: str, needs: RequiredRights, answer: dict[str, Any]) -> StorageError:
    """Return the StorageError for an error response, from its code and HTTP status alone."""
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
    code = str(answer.get("Error", {}).get("Code", ""))
    code = code if re.fullmatch(r"[\w.]{1,60}", code) else "no code"
    text = f"{location}: the server answered {code}" + (f" (HTTP {status})" if str(status) != code else "")
    if _TRANSIENT_CODE.fullmatch(code.removeprefix("KMS.")) or status == 429 or (status >= 500 and status != 501):
        return Unavailable(f"{text}. {_REMEDIES.get(code, CHECK_SERVER)}")
    if code.startswith("KMS."):
        return Rejected(f"{text}. Check the encryption's key (store.kms_key) and the right to use it.")
    is_page = "html" in str(answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("content-type", "")).lower()
    if is_page and status in (400, 401, 403, 405, 407, 501) and code in ("no code", str(status)):
        advice = f"Correct {_ENDPOINT}, or add its host to NO_PROXY."
        return Rejected(f"{text} with a web page, as a proxy or another kind of server does. {advice}")
    if status in (401, 403) and code not in _REMEDIES:
        rights = f"This needs the right {needs.rights} on {needs.on}."
        return AccessDenied(f"{text}. {rights} Grant it to these credentials, or use others.")
    if code in _ERROR_TYPES:
        return _ERROR_TYPES[code](f"{location}: {code}")
    if code == "NoSuchBucket":
        return Rejected(f"{location}: the bucket does not exist. Create it, or correct its name and the endpoint.")
    if code == "NoSuchKey":
        return NotFound(f"{location} does not exist")
    if status == 404 and code in ("404", "no code"):
        return BareNotFound(f"{location} does not exist")
    if 300 <= status < 400:
        return Rejected(f"{text}. {_REGION}")
    if status in (405, 501):
        return NotSupported(f"{text}. It cannot do this: use another, or leave out store.encryption if it is set.")
    return Rejected(f"{text}. {_REMEDIES.get(code, 'Check the endpoint, the bucket and the credentials.')}")


def _host_of_error(error: Exception) -> str:
    """Return the host and port that an error names, without path and credentials."""
    url = getattr(error, "kwargs", {}).get("endpoint_url")
    if not url:
        return "the server"
    parts = urlsplit(str(url))
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
