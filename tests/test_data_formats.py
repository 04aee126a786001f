"""Tables and tar files: the same content as Karpathy's format, and what is wrong with one, told."""
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvam_fast.open_clip_training import write_csv
from mvam_fast.retrieval import scenes
from mvam_fast.retrieval.data.caption_tables import CaptionTable
from mvam_fast.retrieval.data.datasets import KarpathyDataset, UnreadableImage, open_dataset
from mvam_fast.retrieval.data.shards import ShardDataset, expand_braces, find_shards

UNICODE = 'Zürich, 東京 und "🚲"; a\ttab'


@pytest.fixture(scope="module")
def karpathy(tmp_path_factory):
    """Scenes with one to five captions an image, one of them unusual."""
    path = scenes.make_scenes(tmp_path_factory.mktemp("scenes"), train=16, val=4, test=4, progress=False)
    content = json.loads(path.read_text())
    for number, row in enumerate(content["images"]):
        row["sentences"] = row["sentences"][: 1 + number % 5]
    content["images"][3]["sentences"][0]["raw"] = UNICODE
    uneven = path.parent / "dataset_uneven.json"
    uneven.write_text(json.dumps(content))
    return open_dataset(uneven, path.parent / "images", "train")


@pytest.fixture(scope="module")
def table(karpathy, tmp_path_factory):
    out = tmp_path_factory.mktemp("table") / "train.csv"
    return write_csv(karpathy.json_path, karpathy.json_path.parent / "images", "train", out)


@pytest.fixture(scope="module")
def shards(karpathy, tmp_path_factory):
    webdataset = pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("shards")
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"train-{number:03d}.tar")) as writer:
            for index in range(8 * number, 8 * number + 8):
                captions, image = karpathy.captions[index], karpathy.image_paths[index].read_bytes()
                # The kinds of a caption, mixed: a text, a JSON with one or a list, and a JSON that holds none.
                told = {"json": {"captions": captions}}
                if len(captions) == 1:
                    told = {"txt": captions[0], "json": {"width": 64}}
                writer.write({"__key__": f"scenes/{index:06d}", "png": image, **told})
    return str(folder / "train-{000..001}.tar")


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def png(color=0):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def test_every_format_has_the_same_content(karpathy, table, shards):
    for dataset in (open_dataset(table), open_dataset(shards), open_dataset(list(find_shards(shards)))):
        assert dataset.captions == karpathy.captions and len(dataset) == 16
        assert dataset.left_out == {} and dataset.families is None and len(set(dataset.image_ids)) == 16
        for index in (0, 3, 15):
            assert (np.asarray(dataset.load_image(index)) == np.asarray(karpathy.load_image(index))).all()
            assert f"{index:06d}.png" in dataset.image_name(index)
    assert open_dataset(table, split="val").split == "val"
    two = open_dataset(shards, captions_per_image=2)
    assert two.captions == [captions[:2] for captions in karpathy.captions]
    assert karpathy.captions[3][0] == UNICODE


def test_the_format_is_told_by_the_name(tmp_path, table, shards):
    kinds = {table: CaptionTable, shards: ShardDataset, Path(expand_braces(shards)[0]): ShardDataset}
    assert all(type(open_dataset(data)) is kind for data, kind in kinds.items())
    for data, fault in {
        "a.parquet": r"data is 'a.parquet'; it must be a .json \(Karpathy's format\), .csv, .tsv or .tar",
        "a.tar.gz": "data is 'a.tar.gz'", "https://x/{0..9}.tar": "must be a local file", "s3://x/a.csv": "local file",
        "dataset_coco.json": "images is None; dataset_coco.json needs the folder",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=fault):
            open_dataset(data)
    with pytest.raises(ValueError, match="must be a local file"):
        open_dataset(["pipe:cat a.tar"])
    with pytest.raises(ValueError, match="images is .*; it must be left out, for tar files hold their images"):
        open_dataset(shards, tmp_path)


def test_rows_of_a_table_are_grouped_by_image(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,title,filepath\n1,one,x/a.png\n2,zwei,b.png\n3, drei ,./x/a.png\n4,,b.png\n\n", "utf-8-sig")
    table = CaptionTable(path)
    assert table.captions == [["one", "drei"], ["zwei"]] and table.image_ids == ["x/a.png", "b.png"]
    assert table.image_paths == [tmp_path / "x/a.png", tmp_path / "b.png"] and table.left_out == {"empty captions": 1}
    (tmp_path / "other").mkdir()
    assert CaptionTable(path, tmp_path / "other").image_paths[1] == tmp_path / "other/b.png"
    with pytest.raises(UnreadableImage, match="cannot read the image .*b.png: .*No such file"):
        table.load_image(1)
    path.write_text("image;text\na.png;x\n")
    named = CaptionTable(path, split="test", image_column="image", caption_column="text", separator=";")
    assert named.captions == [["x"]] and named.split == "test"


@pytest.mark.parametrize("text, fault", [
    ("", "has no rows below a header"), ("filepath\ttitle\n", "has no rows below a header"),
    ("path\ttitle\na\tb\n", r"row 1: the header is \['path', 'title'\], separated by '\\t'; .* of filepath, title"),
    ("filepath\ttitle\na\tb\nc\n", "row 3: it has 1 columns, the header 2"),
    ("filepath\ttitle\n\tb\n", "row 2: its column 'filepath' is empty"),
    ("filepath\ttitle\na\tb\nc\t \n", "has no caption for the image c"),
    (b"filepath\ttitle\na\t\xff\n", "after row 0: .*utf-8"),
    ("filepath\ttitle\na\t" + "x" * 200_000, "row 2: field"),
    ('filepath\ttitle\na\tb\nc\t"big dog\nd\te\n', "row 3: unexpected end of data"),
    ('filepath,title\na,b\nc,"big dog\nd,small "cat" here\n', "row 3: ',' expected after"),
    ('filepath,title\na,b\nc,"big dog\nd,e\nf,a "\ng,h\n', "row 3: a quote at the start .* closes in a later row"),
    ('filepath\ttitle\nc\t"big dog\r\nd\ta cat"\r\n', "row 2: a quote at the start .* must be doubled"),
    ('title,filepath\n"big dog,c\nsmall",d\n', "row 2: a quote at the start"),
    ('title,n,filepath\na,"1,c\nb,2",d\n', "row 2: a quote at the start"),  # in a column that is not looked at
])  # fmt: skip
def test_what_is_wrong_with_a_table_is_told(tmp_path, text, fault):
    path = tmp_path / "bad.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=fault):
        open_dataset(path)


def test_quotes_that_belong_to_a_caption(tmp_path):
    path = tmp_path / "a.csv"
    rows = 'a,the "big" dog', 'b,"""big"" dog"', 'c,"one, two\nthree"', 'd,"four\nfive"'
    path.write_text("\n".join(["filepath,title", *rows]))
    assert [found for found, in CaptionTable(path).captions] == [
        'the "big" dog', '"big" dog', "one, two\nthree", "four\nfive",
    ]  # fmt: skip


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="data: no such file"):
        open_dataset(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_text("filepath\ttitle\na\tb\n")
    with pytest.raises(FileNotFoundError, match="images: no such folder"):
        open_dataset(tmp_path / "a.csv", tmp_path / "none")
    with pytest.raises(ValueError, match="captions_per_image is 0"):
        open_dataset(tmp_path / "a.csv", captions_per_image=0)


def test_braces_and_wildcards(tmp_path):
    assert expand_braces("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand_braces("{x,y}-{0..1}.tar") == ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    for pattern, fault in {
        "a{3..1}.tar": "must run upwards", "a{1}.tar": r"must be a range as \{000..012\} or a list as \{a,b\}",
        "a{1..2.tar": "do not match", "a{{1..2},3}.tar": "stand within each other",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=fault):
            expand_braces(pattern)
    for name in ("s-1.tar", "s-0.tar", "t.tar"):
        write_tar(tmp_path / name, {"a.png": png(), "a.txt": name.encode()})
    assert find_shards(f"{tmp_path}/s-*.tar") == [tmp_path / "s-0.tar", tmp_path / "s-1.tar"]
    assert ShardDataset(f"{tmp_path}/{{t,s-0}}.tar").image_ids == ["t.tar/a", "s-0.tar/a"]
    with pytest.raises(FileNotFoundError, match=r"2 of 4 shards do not exist, first: .*s-2\.tar"):
        find_shards(f"{tmp_path}/s-{{0..3}}.tar")
    with pytest.raises(FileNotFoundError, match="no file is called like .*u-"):
        find_shards([tmp_path / "t.tar", f"{tmp_path}/u-*.tar"])
    with pytest.raises(ValueError, match=r"the shard .*t\.tar is named more than once"):
        find_shards([tmp_path / "t.tar", tmp_path / "t.tar"])
    with pytest.raises(ValueError, match="empty list"):
        open_dataset([])


def test_incomplete_samples_of_a_shard_are_left_out_and_counted(tmp_path):
    captions = {"captions": ["", "fünf", "six"]}
    path = write_tar(tmp_path / "a.tar", {
        "d/0.jpg": png(), "d/0.txt": b" one ", "1.JPEG": png(), "2.txt": b"bare", "3.webp": b"broken", "3.txt": b"x",
        "4.png": png(), "4.txt": b" \n", "5.jpg": png(7), "5.json": json.dumps(captions).encode(), "5.seg.png": b"-",
        "6.png": png(), "6.json": b'{"caption": "six", "captions": null}', "6.txt": b"not this one", "README": b"hello",
        "__meta__": b"{", ".hidden": b"-",
    })  # fmt: skip
    dataset = ShardDataset(path, "val")
    assert dataset.captions == [["one"], ["x"], ["fünf", "six"], ["six"]] and dataset.split == "val"
    assert dataset.image_ids == ["a.tar/d/0", "a.tar/3", "a.tar/5", "a.tar/6"]
    assert dataset.left_out == {"samples without an image": 1, "samples without a caption": 2, "empty captions": 2}
    assert dataset.load_image(2).getpixel((0, 0)) == (7, 0, 0)
    with pytest.raises(UnreadableImage, match=r"cannot read the image .*a\.tar:3\.webp: "):
        dataset.load_image(1)
    path.unlink()
    with pytest.raises(UnreadableImage, match=r"a\.tar:d/0\.jpg: .*No such file"):
        dataset.load_image(0)


@pytest.mark.parametrize("files, fault", [
    ({}, "no image with a caption: no samples"),
    ({"a.txt": b"x"}, "has no image with a caption: 1 samples without an image"),
    ({"a.png": png(), "a.json": b"{"}, r"a\.tar:a\.json is not valid JSON"),
    ({"a.png": png(), "a.json": b'{"captions": [1]}'}, r"a\.tar:a\.json has the captions \[1\]; they must be strings"),
    ({"a.png": png(), "a.txt": b"\xff"}, r"a\.tar:a\.txt is not UTF-8"),
    ({"a.png": png(), "a.jpg": png(), "a.txt": b"x"}, r"two images for one sample: a\.jpg and a\.png"),
    ({"a.png": png(), "a.PNG": png(), "a.txt": b"x"}, r"holds the file a\.PNG more than once"),
])  # fmt: skip
def test_what_is_wrong_with_a_shard_is_told(tmp_path, files, fault):
    with pytest.raises(ValueError, match=fault):
        open_dataset(write_tar(tmp_path / "a.tar", files))


def test_a_damaged_shard_is_not_taken_for_a_shorter_one(tmp_path):
    whole = write_tar(tmp_path / "a.tar", {"a.png": png(), "a.txt": b"x", "b.png": png(), "b.txt": b"y"}).read_bytes()
    assert len(open_dataset(tmp_path / "a.tar")) == 2
    damaged = bytearray(whole)
    damaged[2048 + 148] ^= 1  # the third header's checksum
    for content, fault in {
        whole[: 2048 + 700]: "not a whole, uncompressed tar file", bytes(damaged): "damaged, or two tar files in one",
        whole[: 2048 + 100]: "damaged, or two tar files in one", whole + whole: "damaged, or two tar files in one",
        b"": "not a whole, uncompressed tar file", b"\x1f\x8b" + whole: "not a whole, uncompressed tar file",
    }.items():  # fmt: skip
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(ValueError, match=fault):
            open_dataset(tmp_path / "a.tar")


def test_a_shard_that_is_cut_at_any_block_is_told(tmp_path):
    long = "n" * 120  # with headers of its own
    files = {"a.png": png(), "a.txt": b"y", f"{long}.png": png(), f"{long}.txt": b"x"}
    path = write_tar(tmp_path / "a.tar", files)
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for cut in range(512, end + 512, 512):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="a.tar is (not (a )?whole|damaged)"):
            open_dataset(path)
    path.write_bytes(whole[:end])
    with pytest.raises(ValueError, match=f"not whole: it stops at byte {end} without the zeros that end a tar file"):
        open_dataset(path)
    path.write_bytes(whole[: end + 512])  # one block of zeros is an end
    assert len(open_dataset(path)) == 2


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_images_that_are_links_are_counted_as_such(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", {"a.png": png(), "a.txt": b"x", "b.txt": b"y", "c.txt": b"z", "d.png": png()})
    with tarfile.open(path, "a") as archive:
        for name in ("a.jpg", "b.png", "d.txt"):  # beside an image of its own; in place of one; of a caption
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.png"
            archive.addfile(member)
    dataset = open_dataset(path)
    assert dataset.image_ids == ["a.tar/a"] and dataset.load_image(0).size == (4, 4)
    assert dataset.left_out == {
        "samples whose image is a link": 1, "samples without an image": 1, "samples without a caption": 1,
    }  # fmt: skip


def test_a_copy_for_workers_reads_the_same_images(karpathy, table, shards):
    for dataset in (karpathy, open_dataset(table), open_dataset(shards)):
        light = dataset.images_only()
        assert light.captions == [] and len(dataset.captions) == 16
        assert light.image_name(5) == dataset.image_name(5) and light.load_image(5).size == (64, 64)
    assert isinstance(karpathy, KarpathyDataset)
