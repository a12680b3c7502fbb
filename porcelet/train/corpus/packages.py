"""Debian packages that hold good text, and where in them it lies.

Measured by hand on Debian 12: the largest of documentation, technical prose, dictionaries and code, all free, all in
English. Left out: what generators add (indexes, search pages, copies of sources), translations, changelogs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GENERATED = (
    r"(^|/)(_sources|_static|_images|_downloads|_modules)/|(^|/)(genindex[^/]*|searchindex|search|contents|print|all"
    r"|py-modindex|bookindex|toc)\.html$"
)


@dataclass(frozen=True, kw_only=True)
class DocPackage:
    """One source of the corpus. `debian` matches the package's name, whose version part varies with the release.

    Files are read below `roots` (glob patterns) unless `skip` matches their path there.
    """

    name: str
    debian: str
    roots: tuple[str, ...]
    skip: str = GENERATED

    @property
    def prefix(self) -> str:
        """What every name that `debian` matches begins with."""
        return re.split(r"\\d", self.debian)[0].replace("\\", "")


PACKAGES = (
    DocPackage(
        name="linux-doc",
        debian=r"linux-doc-\d+\.\d+",
        roots=("usr/share/doc/linux-doc-*/Documentation", "usr/share/doc/linux-doc-*/html"),
        skip=GENERATED + r"|^translations/|\.svg$|^process/maintainers\.html$",
    ),
    DocPackage(name="gcide", debian="dict-gcide", roots=("usr/share/dictd",)),
    DocPackage(
        name="python-stdlib", debian=r"libpython3\.\d+-stdlib", roots=("usr/lib/python3*",), skip="^pydoc_data/"
    ),
    DocPackage(name="python-tests", debian=r"libpython3\.\d+-testsuite", roots=("usr/lib/python3*",)),
    DocPackage(name="python-doc", debian=r"python3\.\d+-doc", roots=("usr/share/doc/python3*/html",)),
    DocPackage(name="sagemath-doc", debian="sagemath-doc", roots=("usr/share/doc/sagemath/html/en",)),
    DocPackage(
        name="rust-doc",
        debian="rust-doc",
        roots=("usr/share/doc/rust-doc/html",),
        skip=GENERATED + "|^(core|src|implementors)/",  # core's pages are std's again
    ),
    DocPackage(name="perl-doc", debian="perl-doc", roots=("usr/share/perl",), skip=r"perluniprops|perltoc"),
    DocPackage(name="wordnet", debian="wordnet-base", roots=("usr/share/wordnet",)),
    DocPackage(name="vim-doc", debian="vim-doc", roots=("usr/share/doc/vim*/html",), skip=GENERATED + "|tags"),
    DocPackage(name="anarchism", debian="anarchism", roots=("usr/share/doc/anarchism/html",)),
    DocPackage(
        name="apache2-doc", debian="apache2-doc", roots=("usr/share/doc/apache2-doc/manual/en",), skip=GENERATED
    ),
    DocPackage(name="postgresql-doc", debian=r"postgresql-doc-\d+", roots=("usr/share/doc/postgresql-doc-*/html",)),
    DocPackage(name="django-doc", debian="python-django-doc", roots=("usr/share/doc/python-django-doc/html",)),
    DocPackage(
        name="openjdk-doc",
        debian=r"openjdk-\d+-doc",
        roots=("usr/share/doc/openjdk-*-jre-headless/api",),
        skip=GENERATED + r"|class-use/|index-files/|(package|overview)-tree\.html$|package-use\.html$|^legal/",
    ),
    DocPackage(
        name="qt-doc", debian=r"qtbase5-doc-html", roots=("usr/share/qt5/doc",), skip=GENERATED + r"|-members\.html$"
    ),
    DocPackage(
        name="libreoffice-help", debian="libreoffice-help-en-us", roots=("usr/share/libreoffice/help/en-US/text",)
    ),
    DocPackage(
        name="llvm-doc", debian=r"llvm-\d+-doc", roots=("usr/share/doc/llvm-*-doc/html",), skip=GENERATED + "|^AMDGPU/"
    ),
    DocPackage(name="cmake-doc", debian="cmake-doc", roots=("usr/share/doc/cmake-data/html",)),
    DocPackage(
        name="sqlalchemy-doc", debian="python-sqlalchemy-doc", roots=("usr/share/doc/python-sqlalchemy-doc/html",)
    ),
    DocPackage(name="sqlite-doc", debian="sqlite3-doc", roots=("usr/share/doc/sqlite3",), skip=GENERATED + "|crossref"),
    DocPackage(name="git-doc", debian="git-doc", roots=("usr/share/doc/git-doc",), skip=r"\.txt$|RelNotes|changelog"),
    DocPackage(name="nodejs-doc", debian="nodejs-doc", roots=("usr/share/doc/nodejs/api",), skip=GENERATED + "|json$"),
    DocPackage(name="foldoc", debian="dict-foldoc", roots=("usr/share/dictd",)),
)
# Long continuous prose, but all of one political opinion, so it comes only when it is asked for.
ON_REQUEST = ("anarchism",)
