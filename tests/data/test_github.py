import ast
import re
import sysconfig
import time
from importlib.metadata import distributions
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillama.data.github import (
    PERMISSIVE,
    has_short_lines,
    is_alphanumeric,
    is_permissive,
    licence,
    strip_header,
)

# --- Licences ------------------------------------------------------------------------------------

MIT = """MIT License

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction ..."""
BSD2 = """Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are met: ..."""
BSD3 = BSD2 + "\n3. Neither the name of the mill nor the names of its millers may be used to ..."
APACHE = "                     Apache License\n               Version 2.0, January 2004\n ..."


@pytest.mark.parametrize(
    ("text", "spdx"),
    [
        (MIT, "MIT"),
        (MIT.upper(), "MIT"),
        (BSD2, "BSD-2-Clause"),
        (BSD3, "BSD-3-Clause"),
        (BSD2 + "The name of the author may not be used to endorse ...", "BSD-3-Clause"),
        (APACHE, "Apache-2.0"),
        ('Licensed under the Apache License, Version 2.0 (the "License")', "Apache-2.0"),
        ("GNU GENERAL PUBLIC LICENSE\nVersion 3", None),
        (MIT + "\nOr, if you like, the GNU Lesser General Public License.", None),
        (MIT + BSD2, None),
        (BSD3 + "All advertising materials mentioning features or use ...", None),
        ("Mozilla Public License Version 2.0", None),
        ("All rights reserved. Ask Ada.", None),
        ("", None),
    ],
)
def test_a_licence_is_known_by_its_sentences(text, spdx):
    assert licence(text) == spdx


def test_the_licences_of_installed_packages_are_those_they_declare():
    """Wherever a package ships one licence file and declares a plain SPDX identifier."""
    declared = []
    for package in distributions():
        spdx = package.metadata.get("License-Expression", "")
        texts = [path for path in package.files or [] if "licenses" in path.parts]
        if len(texts) == 1 and re.fullmatch(r"[\w.-]+", spdx) and spdx != "MIT-0":
            declared.append((spdx, licence(texts[0].read_text(encoding="utf-8"))))
    wrong = {(spdx, found) for spdx, found in declared if found not in (spdx, None)}
    missed = [spdx for spdx, found in declared if spdx.lower() in PERMISSIVE and not found]
    assert len(declared) >= 20
    assert not wrong
    assert len(missed) <= 0.1 * len(declared)  # files that hold several licences


@pytest.mark.parametrize(
    ("spdx", "permissive"),
    [
        ("MIT", True),
        ("mit", True),  # as BigQuery writes it
        ("Apache-2.0", True),
        ("BSD-2-Clause", True),
        ("BSD-3-Clause", True),
        ("BSD-4-Clause", False),
        ("GPL-3.0-only", False),
        ("LGPL-2.1", False),
        ("CC0-1.0", False),
        ("GPL-2.0-only OR MIT", True),
        ("MIT AND Apache-2.0", True),
        ("MIT AND GPL-2.0-only", False),
        ("MIT AND GPL-2.0-only OR BSD-2-Clause", True),
        ("(MIT OR GPL-2.0-only) AND GPL-3.0-only", False),
        ("NOASSERTION", False),
        ("", False),
    ],
)
def test_apache_bsd_and_mit_alone_are_permissive(spdx, permissive):
    assert is_permissive(spdx) == permissive


# --- Heuristics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "short"),
    [
        ("x" * 100, True),
        ("x" * 101, False),  # the mean
        ("x" * 1000 + "\nx" * 99, True),
        ("x" * 1001 + "\nx" * 99, False),  # the longest
        ("x" * 150 + "\n" + "x" * 50, True),  # a mean of exactly 100
        ("x" * 150 + "\n" + "x" * 51, False),
        ("", True),
    ],
)
def test_lines_are_at_most_1000_and_on_average_100_characters(code, short):
    assert has_short_lines(code) == short


def test_the_thresholds_are_arguments():
    assert not has_short_lines("abc\nd", longest=2)
    assert not has_short_lines("abc\nd", mean=1.9)
    assert has_short_lines("abc\nd", longest=3, mean=2)
    assert is_alphanumeric("a-", share=0.5)
    assert not is_alphanumeric("a--", share=0.5)


@pytest.mark.parametrize(
    ("code", "enough"),
    [("ab1+()[]", True), ("é?!.", True), ("a?!. ", False), ("####", False), ("", False)],
)
def test_a_quarter_of_the_characters_are_letters_or_digits(code, enough):
    assert is_alphanumeric(code) == enough


# --- Headers -------------------------------------------------------------------------------------

HASH = "# Copyright 2020 The Mill\n#\n# Licensed under the Apache License.\n"
STAR = "/*\n * Copyright (c) 2020 The Mill\n * All rights reserved.\n */\n"


@pytest.mark.parametrize(
    ("code", "stripped"),
    [
        (HASH + "\nimport kite\n", "import kite\n"),
        (STAR + "\n#include <kite.h>\n", "#include <kite.h>\n"),
        ("// SPDX-License-Identifier: MIT\nint kite;\n", "int kite;\n"),
        ("-- (c) 2020 Ada\nSELECT kite;\n", "SELECT kite;\n"),
        (";; Copyright (C) 2020 Ada\n(kite)\n", "(kite)\n"),
        ("<!-- Copyright by Ada -->\n<kite/>\n", "<kite/>\n"),
        ("(* Copyright 2020 Ada *)\nlet kite = 1\n", "let kite = 1\n"),
        ("{- Copyright 2020 Ada -}\nkite = 1\n", "kite = 1\n"),
        ("####\n# Copyright 2020 Ada\n####\nkite()", "kite()"),
        ("#----\n# Copyright 2020 Ada\n#----\nkite()", "kite()"),
        ("//////\n// Copyright 2020 Ada\n//////\nkite()", "kite()"),
        ("# Copyright 2020 Ada\r\nkite()\r\n", "kite()\r\n"),
        ("\n\n# Copyright 2020 Ada\n\n\nkite()", "kite()"),
        ("# Copyright 2020 Ada", ""),
    ],
)
def test_a_licence_header_goes(code, stripped):
    assert strip_header(code) == stripped


@pytest.mark.parametrize(
    "top",
    [
        "#!/usr/bin/env python3\n",
        "# -*- coding: latin-1 -*-\n",
        "#!/bin/sh\n# vim: set fileencoding=utf-8 :\n",
        "# frozen_string_literal: true\n",
        "<?php\n",
        "<?xml version='1.0'?>\n",
        "<!DOCTYPE html>\n",
        "\ufeff#!/bin/sh\n",
    ],
)
def test_what_a_machine_reads_stays_on_top(top):
    assert strip_header(top + HASH + "kite()\n") == top + "kite()\n"


def test_an_encoding_may_stand_below_the_first_line_of_the_header():
    code = "# Copyright 2020 Ada\n# coding: utf-8\n# All rights reserved.\nkite()\n"
    assert strip_header(code) == "# coding: utf-8\nkite()\n"


def test_only_the_comments_about_the_licence_go():
    code = "# Flies kites.\n\n" + HASH + "\n# Made of paper.\nkite()\n"
    assert strip_header(code) == "# Flies kites.\n\n\n# Made of paper.\nkite()\n"


def test_several_headers_go():
    assert strip_header(HASH + "\n" + HASH + "\nkite()\n") == "kite()\n"


@pytest.mark.parametrize(
    "code",
    [
        "kite()\n# Copyright 2020 Ada\n",  # below the first line of code
        "# Reads the licence plate of a cart.\nplate()\n",
        "# A kite.\nkite()\n",
        '"""Copyright 2020 Ada"""\nkite()\n',  # a program can read its docstring
        "# Copyright 2020 by Ada\n# define KITE 1\n# include <kite.h>\n",
        "# if defined(KITE) // Copyright 2020\n# endif\n",
        "#define COPYRIGHT_2020 1\n",
        '#![doc = "Copyright 2020"]\n#[derive(Kite)]\n',
        "//go:build copyright (c) 2020\n",
        "// +build copyright(c)\n\npackage kite\n",
        "--kite; // Copyright 2020\n",
        "/* Copyright 2020 */ int kite;\n",
        "/* Copyright 2020 /* nested */ still a comment in Rust */\nkite();\n",
        "/* Copyright 2020 /* nested */\n still a comment in Rust */\nkite();\n",
        "/* Copyright 2020, never closed\nkite();\n",
        "{-# LANGUAGE Copyright #-} -- (c) 2020\n",
        "{-# OPTIONS Copyright by #-}\nkite = 1\n",
        "<!--[if IE]> Copyright 2020 <![endif]-->\n<kite/>\n",
        ";(function(){ /* Copyright 2020 */ })()\n",
        "",
        "\n\n",
    ],
)
def test_everything_else_stays_as_it_is(code):
    assert strip_header(code) == code


LINES = st.sampled_from(
    [
        "x = 1",
        "#include <x>",
        "#define X",
        "--x;",
        "/* c */ x;",
        "//go:generate x",
        "; x",
        "'''",
        "{",
        "x # Copyright 2020",
        "#if X",
        "%x",
        "<x>",
        '"Copyright 2020"',
        "#!x",
        "{-# P #-}",
        "*/",
        "}",
    ]
)
HEADERS = st.sampled_from(
    ["", HASH, STAR, "// Copyright 2020 Ada\n", "-- (c) 2020\n", "<!--\nMIT License\n-->\n", "\n"]
)


@given(st.lists(HEADERS, max_size=3), st.lists(LINES, min_size=1, max_size=6))
def test_no_line_of_code_is_ever_removed(headers, lines):
    code = "\n".join(lines) + "\n"
    assert strip_header("".join(headers) + code).endswith(code)


@given(st.lists(HEADERS, max_size=3), st.lists(LINES, max_size=6))
def test_a_second_time_changes_nothing(headers, lines):
    once = strip_header("".join(headers) + "\n".join(lines))
    assert strip_header(once) == once


def test_the_standard_library_means_the_same_without_its_headers():
    """Python's own parser is the judge: stripped of its header, a file has the same syntax tree."""
    stripped = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:80]:
        code = path.read_text(encoding="utf-8")
        rest = strip_header(code)
        if rest != code:
            stripped += 1
            assert ast.dump(ast.parse(rest)) == ast.dump(ast.parse(code)), path
    assert stripped >= 3


@pytest.mark.parametrize(
    "unit",
    ["/*", "<!--", "# ", "// ", "--", "(*", "{-", "#\n", "/* x */\n", "\n", "a", "#!", ";; "],
)
def test_a_long_file_of_one_thing_takes_no_time(unit):
    code = (unit * 200_000)[:200_000]
    start = time.process_time()
    strip_header(code), has_short_lines(code), is_alphanumeric(code), licence(code)
    assert time.process_time() - start < 1
