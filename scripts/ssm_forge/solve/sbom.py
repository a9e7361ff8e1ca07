"""Software bill of materials of a locked environment: CycloneDX JSON, by the format's own Python library."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Mapping
from typing import Any

from rattler import RepoDataRecord

from ssm_forge.base.errors import MachineError
from ssm_forge.base.paths import launcher
from ssm_forge.package.intact import digest
from ssm_forge.solve.lock import LockedEnvironment, is_from
from ssm_forge.solve.order import channel_names, dependency_names

# Namespace of serial numbers: the same lock gives the same one.
_NAMESPACE = uuid.UUID("8f4f7a3e-2a67-5c0b-9d64-3f0c0f6c9a51")


def bill_of_materials(locked: LockedEnvironment) -> str:
    """CycloneDX 1.6: each package with purl, hashes, licence, URL, and what it depends on.

    What packages from source are built with, compilers among it, is listed with the scope "excluded": not installed.

    The same lock gives the same bytes: its hashes make the serial number, its newest package the time.

    Raises:
        MachineError: when the library is not installed.
    """
    try:
        from cyclonedx.model.bom import Bom
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.output import make_outputter
        from cyclonedx.schema import OutputFormat, SchemaVersion
    except ImportError as error:
        raise MachineError(
            "the Python library cyclonedx-python-lib is not in this environment.",
            fix=f"Run 'SSM_FORGE_NO_PIXI=1 ./run' instead of '{launcher()}': its private environment has it.",
        ) from error
    root = Component(name=f"ssm-forge-{locked.name}", type=ComponentType.APPLICATION, bom_ref=locked.name)
    components = {r.name.normalized: _component(r, locked) for r in locked.records}
    tools = _tools(locked, components)
    bom = Bom(components=[*components.values(), *tools])
    bom.metadata.component = root
    bom.serial_number = uuid.uuid5(_NAMESPACE, "\n".join(":".join(digest(r)) for r in locked.records))
    newest = max((r.timestamp for r in locked.records if r.timestamp), default=None)
    bom.metadata.timestamp = newest or datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
    bom.register_dependency(root, components.values())
    for record in locked.records:
        needed = [components[n] for n in dependency_names(record) if n in components]
        bom.register_dependency(components[record.name.normalized], needed)
    outputter = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6)
    return str(outputter.output_as_string(indent=2)) + "\n"


def _tools(locked: LockedEnvironment, installed: Mapping[str, Any]) -> list[Any]:
    """Components for what is only built with; each package from source names all that it is built with."""
    from cyclonedx.model import Property
    from cyclonedx.model.component import ComponentScope

    installed_purls = {str(component.purl): component for component in installed.values()}
    tools: dict[str, Any] = {}
    for source in locked.sources:
        for record in (*source.build, *source.host):
            component = _component(record, locked)
            purl = str(component.purl)
            if purl not in installed_purls:
                component.scope = ComponentScope.EXCLUDED
                tools.setdefault(purl, component)
            if source.name in installed:
                installed[source.name].properties.add(Property(name="ssm-forge:built-with", value=purl))
    return list(tools.values())


def _component(record: RepoDataRecord, locked: LockedEnvironment) -> Any:
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    names = zip(locked.channels, channel_names(locked), strict=True)
    channel = next((name for url, name in names if is_from(record, url)), "")
    kind = "conda" if record.file_name.endswith(".conda") else "tar.bz2"
    purl = PackageURL(
        "conda",
        name=record.name.normalized,
        version=str(record.version),
        qualifiers={"build": str(record.build), "channel": channel, "subdir": record.subdir, "type": kind},
    )
    hashes = []
    if record.sha256:
        hashes.append(HashType(alg=HashAlgorithm.SHA_256, content=bytes(record.sha256).hex()))
    if record.md5:
        hashes.append(HashType(alg=HashAlgorithm.MD5, content=bytes(record.md5).hex()))
    return Component(
        name=record.name.normalized,
        version=str(record.version),
        type=ComponentType.LIBRARY,
        bom_ref=str(purl),
        purl=purl,
        hashes=hashes,
        licenses=[LicenseFactory().make_from_string(record.license)] if record.license else [],
        external_references=[
            ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(record.url), hashes=hashes)
        ],
    )
