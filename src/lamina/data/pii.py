"""Personal data in texts, through the recognizers of presidio-analyzer that work by patterns and
check sums. Those that need a language model (names, places) are not used: they would have to be
downloaded, and are wrong too often to be listed row by row."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from lamina.errors import DataError

__all__ = ["PersonalData"]

_RECOGNIZERS = (
    ("EmailRecognizer", "an e-mail address"),
    ("PhoneRecognizer", "a phone number"),
    ("CreditCardRecognizer", "a credit card number"),
    ("IbanRecognizer", "an IBAN"),
    ("IpRecognizer", "an IP address"),
    ("CryptoRecognizer", "a crypto wallet"),
    ("UsSsnRecognizer", "a US social security number"),
)

#: Below this, presidio's own score says "could be anything".
_SCORE = 0.4


class PersonalData:
    """Finds personal data.

    Raises:
        DataError: presidio-analyzer isn't installed.
    """

    def __init__(self) -> None:
        logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
        try:
            module = importlib.import_module("presidio_analyzer.predefined_recognizers")
            domains = importlib.import_module("tldextract")
        except ImportError as error:
            raise DataError(
                "Looking for personal data needs the package presidio-analyzer, which is not "
                "installed.",
                hint="pip install 'lamina[pii]'",
            ) from error
        self._recognizers: list[tuple[Any, str]] = [
            (getattr(module, name)(), kind) for name, kind in _RECOGNIZERS if hasattr(module, name)
        ]
        # Domains are told by the list in the package: by default it is fetched from the network.
        known = domains.TLDExtract(suffix_list_urls=(), cache_dir=None)
        for recognizer, _ in self._recognizers:
            if type(recognizer).__name__ == "EmailRecognizer":
                recognizer.validate_result = lambda text: bool(known(text).fqdn)

    def kinds(self, text: str) -> list[str]:
        """The kinds of personal data in a text, e.g. `an e-mail address`."""
        return [
            kind
            for recognizer, kind in self._recognizers
            if any(
                result.score >= _SCORE
                for result in recognizer.analyze(text, recognizer.supported_entities, None) or []
            )
        ]
