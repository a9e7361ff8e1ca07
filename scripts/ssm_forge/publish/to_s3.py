"""Publishing to an S3 bucket: packages by a conditional PUT that never replaces, the index by the engine.

The engine's Python bindings index a bucket but do not upload into one, so boto3 does that. Credentials,
region and endpoint come from where every AWS tool takes them (``AWS_*`` variables, ``~/.aws``).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ssm_forge.base.credentials import redact
from ssm_forge.base.errors import IntegrityError, NetworkError, UsageError
from ssm_forge.base.web import TransientError
from ssm_forge.channel import folder as channels
from ssm_forge.channel import index as repodata
from ssm_forge.publish.target import Advance, Outcome, Parcel, Publishable, compare

# More than this needs a multipart upload, which can't be conditional everywhere.
_MOST_BYTES = 5_000_000_000
_T = TypeVar("_T")


class S3Target:
    """A channel in a bucket, ``s3://BUCKET/PREFIX``; its methods are those of :class:`Target`."""

    def __init__(self, url: str) -> None:
        import boto3
        from botocore.config import Config

        parts = urlsplit(url)
        self.url = url.rstrip("/")
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        session = boto3.Session()
        self._client = session.client("s3", config=Config(retries={"mode": "standard", "max_attempts": 3}))
        self._credentials = session.get_credentials()

    def present(self, package: Publishable) -> str | None:
        try:
            listed = compare(package, self._records(package.subdir).get(package.filename))
        except repodata.DamagedIndexError:
            listed = None  # The object itself is asked, and the index is written anew in the end.
        return listed or self._stored(package)

    def upload(self, parcel: Parcel, advance: Advance) -> Outcome:
        package = parcel.package
        if package.size > _MOST_BYTES:
            raise UsageError(f"{package.filename} is larger than one S3 PUT takes ({_MOST_BYTES} bytes).")
        checksum = base64.b64encode(bytes.fromhex(package.sha256)).decode()
        with package.path.open("rb") as stream:
            created = self._call(
                lambda: self._client.put_object(
                    Bucket=self._bucket,
                    Key=self._key(package.subdir, package.filename),
                    Body=stream,
                    ChecksumSHA256=checksum,
                    IfNoneMatch="*",
                    Metadata={"sha256": package.sha256},
                )
            )
        advance(package.size)
        if created is None and self._stored(package) != package.sha256:
            raise channels.different(package.filename, self.url)
        return "added" if created is not None else "was there"

    def attach(self, parcel: Parcel) -> bool:
        package = parcel.package
        digest = hashlib.sha256(parcel.statements).hexdigest()
        for name in (f"{package.filename}.sigs.{digest}", f"{package.filename}.sigs"):
            self._put(package.subdir, name, parcel.statements)
        return True

    def finish(self, parcels: Sequence[Parcel]) -> None:
        from rattler.index import index_s3

        frozen = self._credentials.get_frozen_credentials() if self._credentials else None
        try:
            asyncio.run(index_s3(self.url, credentials=self._engine_credentials(frozen), write_zst=True))
        except Exception as error:
            # The engine's check that nobody else changed the index meanwhile fails like any other error.
            raise TransientError(redact(f"the index of {self.url} could not be written: {error}")) from error
        for subdir in sorted({p.package.subdir for p in parcels} | {"noarch"}):
            data = self._get(subdir, "repodata.json")
            if data is not None:
                content = repodata.document(data, f"{self.url}/{subdir}/repodata.json")
                self._put(subdir, "run_exports.json", repodata.run_exports(content))
        missing = [p for p in parcels if p.package.filename not in self._records(p.package.subdir)]
        if missing:
            raise TransientError(f"the index of {self.url} does not list {missing[0].package.filename} yet.")

    def _engine_credentials(self, frozen: Any) -> Any:
        from rattler.index import S3Credentials

        meta = self._client.meta
        return S3Credentials(
            endpoint_url=meta.endpoint_url,
            region=meta.region_name or "us-east-1",
            access_key_id=frozen.access_key if frozen else None,
            secret_access_key=frozen.secret_key if frozen else None,
            session_token=frozen.token if frozen else None,
            # A bucket as part of the host name needs DNS for it, which self-hosted servers rarely have.
            addressing_style="virtual-host" if "amazonaws.com" in meta.endpoint_url else "path",
        )

    def _records(self, subdir: str) -> repodata.Records:
        data = self._get(subdir, "repodata.json")
        return repodata.records(data, f"{self.url}/{subdir}/repodata.json") if data is not None else {}

    def _stored(self, package: Publishable) -> str | None:
        """sha256 of the object itself, which a killed run may have left out of the index."""
        key = self._key(package.subdir, package.filename)
        head = self._call(lambda: self._client.head_object(Bucket=self._bucket, Key=key))
        if head is None:
            return None
        stated_sha256 = head.get("Metadata", {}).get("sha256")
        if stated_sha256:
            return str(stated_sha256)
        data = self._get(package.subdir, package.filename)
        return hashlib.sha256(data).hexdigest() if data is not None else None

    def _key(self, subdir: str, name: str) -> str:
        return "/".join(part for part in (self._prefix, subdir, name) if part)

    def _get(self, subdir: str, name: str) -> bytes | None:
        key = self._key(subdir, name)
        answer = self._call(lambda: self._client.get_object(Bucket=self._bucket, Key=key))
        return None if answer is None else bytes(answer["Body"].read())

    def _put(self, subdir: str, name: str, data: bytes) -> None:
        key = self._key(subdir, name)
        self._call(lambda: self._client.put_object(Bucket=self._bucket, Key=key, Body=data))

    def _call(self, action: Callable[[], _T]) -> _T | None:
        """``action``'s result; None when the object is missing, or there though it must not be."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return action()
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = error.response.get("Error", {}).get("Code", "")
            if code == "NoSuchBucket":
                raise UsageError(f"there is no bucket '{self._bucket}'.", fix="Create it first.") from error
            if status in (404, 412):
                return None
            if code == "BadDigest":
                raise IntegrityError(f"{self.url}: the object arrived with other bytes than were sent.") from error
            reason = redact(f"{self.url} answered {status}: {error}")
            if status in (409, 429) or status >= 500:
                raise TransientError(reason) from error
            raise NetworkError(reason, fix="Check the AWS credentials, region and rights on the bucket.") from error
        except BotoCoreError as error:
            if "credentials" in str(error).lower():
                raise NetworkError(
                    f"there are no credentials for {self.url}.",
                    fix="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
                ) from error
            raise TransientError(redact(f"{self.url} could not be reached: {error}")) from error
