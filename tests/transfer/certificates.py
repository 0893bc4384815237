"""A CA of a test's own, and certificates for the roles of the KV stream."""

from pathlib import Path

import trustme

from pagewire.net.tls import DOMAIN, Tls


class Certificates:
    def __init__(self, folder: Path) -> None:
        self._folder, self._ca = folder, trustme.CA()
        self._ca.cert_pem.write_to_path(str(folder / "ca.pem"))

    def tls(self, role: str) -> Tls:
        issued = self._ca.issue_cert(role + DOMAIN)
        issued.cert_chain_pems[0].write_to_path(str(self._folder / f"{role}.pem"))
        issued.private_key_pem.write_to_path(str(self._folder / f"{role}.key"))
        return Tls(str(self._folder / "ca.pem"), str(self._folder / f"{role}.pem"), str(self._folder / f"{role}.key"))

    def options(self, role: str) -> list[str]:
        """Of `pagewire serve`."""
        tls = self.tls(role)
        return ["--tls-ca", tls.ca, "--tls-certificate", tls.certificate, "--tls-key", tls.key]
