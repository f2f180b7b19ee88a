# SPDX-License-Identifier: Apache-2.0
"""What `--formats` means."""

import pytest

from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.evaluation.specs import parse_formats


def test_the_reference_comes_first_even_if_not_named():
    assert [spec.label for spec in parse_formats("int2")] == ["auto", "int2"]
    assert [spec.label for spec in parse_formats("int2,auto,oscar-int2")] == ["auto", "int2", "oscar-int2"]
    assert [spec.label for spec in parse_formats("auto")] == ["auto"]


def test_overrides_belong_to_the_format_before_them():
    specs = parse_formats("oscar-int2:rotation=some/file,recent_tokens=256, hadamard-int2 ,int2:sink_tokens=0")
    assert [spec.label for spec in specs] == [
        "auto",
        "oscar-int2:rotation=some/file,recent_tokens=256",
        "hadamard-int2",
        "int2:sink_tokens=0",
    ]
    assert specs[1].kv_cache_dtype == "oscar-int2"
    assert specs[1].additional_config == {"kvcompress": {"rotation": "some/file", "recent_tokens": 256}}
    assert specs[2].additional_config == {}
    assert specs[3].additional_config == {"kvcompress": {"sink_tokens": 0}}


def test_the_same_format_twice_with_different_settings():
    specs = parse_formats("oscar-int2,oscar-int2:recent_tokens=8")
    assert [spec.label for spec in specs] == ["auto", "oscar-int2", "oscar-int2:recent_tokens=8"]


def test_own_overrides_win_over_common_settings_over_additional_config():
    specs = parse_formats(
        "oscar-int2:recent_tokens=8,int2,fp8",
        common={"recent_tokens": 128, "rotation": "file"},
        additional_config={"other": 1, "kvcompress": {"recent_tokens": 1, "sink_tokens": 32}},
    )
    auto, oscar, int2, fp8 = specs
    assert oscar.additional_config["kvcompress"] == {"recent_tokens": 8, "sink_tokens": 32, "rotation": "file"}
    # The common rotation file is for formats that read one; int2 would refuse it.
    assert int2.additional_config["kvcompress"] == {"recent_tokens": 128, "sink_tokens": 32}
    # Formats that are not ours see other settings of additional_config, and none of ours.
    assert auto.additional_config == fp8.additional_config == {"other": 1}
    assert (oscar.windows("any"), fp8.windows("any"), auto.windows("any")) == ((32, 8), (0, 0), (0, 0))


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ("oscar-int3", "unknown format 'oscar-int3'.*oscar-int2.*fp8"),
        ("int2,int2", "int2 more than once"),
        ("int2,,auto", "empty name"),
        ("", "empty name"),
        ("sink_tokens=1,int2", "before any format"),
        ("int2:centring", "cannot read 'centring'"),
        ("int2:centring=", "cannot read 'centring='"),
        ("int2:=3", "cannot read '=3'"),
        ("fp8:sink_tokens=3", "only this package's formats take settings"),
        ("auto:sink_tokens=3", "only this package's formats take settings"),
    ],
)
def test_refusals(formats, message):
    with pytest.raises(KVCompressError, match=message):
        parse_formats(formats)


def test_unknown_setting_is_refused_before_any_engine_starts():
    spec = parse_formats("int2:recent=3")[1]
    with pytest.raises(KVCompressError, match="recent"):
        spec.windows("any")
