"""Each thing that ShapeNet's files do, by a file that does it.  The square below is two triangles
unless a test says else."""
import time

import numpy as np
import pytest
import torch
from PIL import Image

from shapes import meshes
from common import UserError
from shapes.meshes import load_obj

SQUARE = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
RED, GREEN = (255, 0, 0), (0, 255, 0)


@pytest.fixture
def model(tmp_path):
    """Writes files into a model folder of ShapeNet v2's shape and loads it."""
    folder = tmp_path / "model"
    (folder / "models").mkdir(parents=True)
    (folder / "images").mkdir()

    def write(obj, mtl=None, **textures):
        (folder / "models/model_normalized.obj").write_bytes(obj if isinstance(obj, bytes) else obj.encode())
        if mtl is not None:
            (folder / "models/m.mtl").write_text(mtl)
        for name, colour in textures.items():
            Image.new("RGB", (4, 4), colour).save(folder / f"images/{name}.png")
        return load_obj(folder / "models/model_normalized.obj")
    write.folder = folder
    return write


def colours(mesh):
    """The colour of each face, as tuples."""
    return [tuple(mesh.texels[mesh.start[m]].tolist()) for m in mesh.material]


def test_negative_indices_count_back_from_their_own_line(model):
    mesh = model("v 0 0 0\nv 1 0 0\nv 1 1 0\nf -3 -2 -1\nv 5 5 5\nv 6 5 5\nv 6 6 5\nf -3 -2 -1\n")
    assert mesh.faces.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_negative_texture_coordinates_too(model):
    mesh = model(SQUARE + "f -4/-4 -3/-3 -2/-2\nvt 9 9\nf -4/-1 -2/-3 -1/-2\n")
    assert mesh.uvs.tolist() == [[[0, 0], [1, 0], [1, 1]], [[9, 9], [1, 1], [0, 1]]]


def test_polygons_become_fans(model):
    assert model(SQUARE + "f 1 2 3 4\n").faces.tolist() == [[0, 1, 2], [0, 2, 3]]


def test_mixed_corners(model):
    mesh = model(SQUARE + "vn 0 0 1\nmtllib m.mtl\nusemtl a\n"
                 "f 1/1 2 3\nf 1//1 2//1 3//1\nf 1/1/1 2/2/1 3/3/1\n",
                 "newmtl a\nKd 1 0 0\nmap_Kd ../images/t.png\n", t=GREEN)
    assert colours(mesh) == [RED, RED, GREEN]        # a face without all its texture coordinates takes the Kd


@pytest.mark.parametrize("obj", [
    pytest.param(SQUARE.replace(" ", "\t") + "f\t1\t2\t3\n", id="tabs"),
    pytest.param(SQUARE.replace("\n", "\r\n") + "f 1 2 3\r\n", id="crlf"),
    pytest.param(SQUARE.replace("\n", "\r") + "f 1 2 3", id="cr"),
    pytest.param("\ufeff" + SQUARE + "f 1 2 3", id="bom"),
    pytest.param(SQUARE + "f 1 \\\n 2 \\\n3\n", id="continued"),
    pytest.param(SQUARE + "# a path\\\nf 1 2 3\n", id="comment-ending-in-backslash"),
    pytest.param(b"# caf\xe9 \xff\n" + SQUARE.encode() + b"g \xe9\nf 1 2 3", id="not-utf8"),
    pytest.param(SQUARE + "f 1 2 3 # a comment\n", id="comment-after"),
    pytest.param("o x\ns off\ng a b\n" + SQUARE + "l 1 2\np 1\nvp 1 2\nf 1 2 3", id="other-keywords")])
def test_lines(model, obj):
    assert model(obj).faces.tolist() == [[0, 1, 2]]


def test_numbers(model):
    # With a weight or colours after them
    mesh = model("v .5 1e-07 -1.E+2 1.0 0 0\nv 1 0 0\nv 1 1 0\nf 1 2 3\n")
    assert mesh.vertices[0].tolist() == [0.5, 1e-07, -100]


def test_material_names_with_spaces_and_bytes(model):
    folder = model.folder / "models"
    (folder / "m.mtl").write_bytes(b"newmtl blue  caf\xe9\nKd 1 0 0\nnewmtl b\nKd 0 1 0\n")
    mesh = model(SQUARE.encode() + b"mtllib m.mtl\nusemtl blue caf\xe9\nf 1 2 3\nusemtl b\nf 1 3 4\n")
    assert colours(mesh) == [RED, GREEN] and mesh.notes == []


def test_kd_missing_grey_numbers_or_wrong(model):
    mesh = model(SQUARE + "mtllib m.mtl\n" + "".join(f"usemtl {name}\nf 1 2 3\n" for name in "abcd"),
                 "newmtl a\nKa 1 1 1\nnewmtl b\nKd .2\nnewmtl c\nKd spectral x.rfl\n"
                 "newmtl d\nKd 2 -1 0\nTr 1\nd 0\n")
    assert colours(mesh) == [(128,) * 3, (51,) * 3, (128,) * 3, RED]


def test_faces_without_material_and_materials_without_entry(model):
    mesh = model(SQUARE + "mtllib m.mtl\nf 1 2 3\nusemtl nowhere\nf 1 3 4\n", "newmtl a\nKd 1 0 0\n")
    assert colours(mesh) == [(128,) * 3] * 2
    assert mesh.notes == ["material 'nowhere' is in no material file: grey"]


def test_missing_mtl(model):
    mesh = model(SQUARE + "mtllib gone.mtl\nusemtl a\nf 1 2 3\n")
    assert mesh.notes[0] == "material file 'gone.mtl' is missing" and colours(mesh) == [(128,) * 3]


def test_several_material_files(model):
    (model.folder / "models/n.mtl").write_text("newmtl b\nKd 0 1 0\nnewmtl a\nKd 0 0 1\n")
    (model.folder / "models/with space.mtl").write_text("newmtl c\nKd 0 0 1\n")
    mesh = model(SQUARE + "mtllib m.mtl n.mtl\nmtllib with space.mtl\n"
                 "usemtl a\nf 1 2 3\nusemtl b\nf 1 2 3\nusemtl c\nf 1 2 3\n",
                 "newmtl a\nKd 1 0 0\n")
    assert colours(mesh) == [RED, GREEN, (0, 0, 255)] and mesh.notes == []


@pytest.mark.parametrize("line", [
    "map_Kd ../images/t.png",
    "map_Kd ../images/T.PNG",
    "map_Kd ..\\images\\t.png",
    "map_Kd ./images/t.png",
    "map_Kd images/t.png",
    "map_Kd -s 1 1 1 ../images/t.png",
    "map_Kd -clamp on -o 0.5 0 -bm 2 ../images/t.png",
    'map_Kd "../images/t.png"',
    "MAP_KD ../Images/t.png",
    "map_Kd .././images//t.png"])
def test_textures_are_found(model, line):
    mesh = model(SQUARE + "mtllib m.mtl\nusemtl a\nf 1/1 2/2 3/3\n", f"newmtl a\nKd 1 0 0\n{line}\n", t=GREEN)
    assert colours(mesh) == [GREEN] and mesh.notes == [] and mesh.textured[mesh.material].all()


def test_texture_name_with_spaces(model):
    Image.new("RGB", (2, 2), GREEN).save(model.folder / "images/my wood 1.png")
    mesh = model(SQUARE + "mtllib m.mtl\nusemtl a\nf 1/1 2/2 3/3\n",
                 "newmtl a\nmap_Kd -s 1 1 1 ../images/my wood 1.png\n")
    assert colours(mesh) == [GREEN]


def textured(model, line):
    return model(SQUARE + "mtllib m.mtl\nusemtl a\nf 1/1 2/2 3/3\nf 1/1 3/3 4/4\n",
                 f"newmtl a\nKd 1 0 0\nmap_Kd {line}\n")


def test_missing_texture_falls_back_to_kd_and_says_so_once(model):
    mesh = textured(model, "../images/gone.png")
    assert colours(mesh) == [RED, RED]
    assert mesh.notes == ["texture '../images/gone.png' is missing: its Kd instead"]


def test_broken_texture(model):
    Image.effect_noise((64, 64), 90).save(model.folder / "images/t.png")
    whole = (model.folder / "images/t.png").read_bytes()
    damaged = whole[:60] + bytes(40) + whole[100:]
    for broken in (whole[:len(whole) // 2], whole[:20], b"", b"no image", damaged):
        (model.folder / "images/t.png").write_bytes(broken)
        mesh = textured(model, "../images/t.png")
        assert colours(mesh) == [RED, RED] and len(mesh.notes) == 1 and "broken" in mesh.notes[0]


def test_only_png_and_jpeg_are_opened(model):
    Image.new("RGB", (4, 4), GREEN).save(model.folder / "images/t.png", format="GIF")
    assert colours(textured(model, "../images/t.png")) == [RED, RED]
    Image.new("RGB", (4, 4), GREEN).save(model.folder / "images/t.png", format="JPEG")
    assert np.abs(np.array(colours(textured(model, "../images/t.png"))) - GREEN).max() < 3


def test_texture_sizes(model, monkeypatch):
    Image.new("RGB", (1100, 300), GREEN).save(model.folder / "images/t.png")
    assert textured(model, "../images/t.png").shape[0].tolist() == [100, 367]       # reduced by 3
    monkeypatch.setattr(meshes, "MAX_PIXELS", 1000)
    monkeypatch.setattr(Image.Image, "convert", lambda *a: pytest.fail("decoded before its size was checked"))
    assert colours(textured(model, "../images/t.png")) == [RED, RED]


def test_paths_that_leave_the_folder_are_refused(model, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4), GREEN).save(secret)
    (tmp_path / "secret.mtl").write_text("newmtl a\nKd 0 1 0\n")
    (model.folder / "images/link.png").symlink_to(secret)
    (model.folder / "images/dir").symlink_to(tmp_path)
    for line in ("../../secret.png", str(secret), "../images/link.png", "../images/dir/secret.png",
                 "..\\..\\secret.png", "C:\\secret.png", "../images/../../secret.png"):
        mesh = textured(model, line)
        assert colours(mesh) == [RED, RED] and "refused" in mesh.notes[0], line
    for line in ("../../secret.mtl", str(tmp_path / "secret.mtl")):
        mesh = model(SQUARE + f"mtllib {line}\nusemtl a\nf 1 2 3\n")
        assert colours(mesh) == [(128,) * 3] and any("refused" in note for note in mesh.notes)


def test_an_obj_that_is_a_link_out_of_its_folder_is_refused(model, tmp_path):
    (tmp_path / "secret.obj").write_text(SQUARE + "f 1 2 3\n")
    (model.folder / "models/model_normalized.obj").symlink_to(tmp_path / "secret.obj")
    with pytest.raises(UserError, match="model_normalized.obj is a link that leads out .* refused"):
        load_obj(model.folder / "models/model_normalized.obj")
    (model.folder / "models/model_normalized.obj").unlink()
    (model.folder / "whole.obj").write_text(SQUARE + "f 1 2 3\n")
    (model.folder / "models/model_normalized.obj").symlink_to("../whole.obj")      # inside it may
    assert len(load_obj(model.folder / "models/model_normalized.obj").faces) == 1


def test_links_inside_the_folder_are_followed(model, tmp_path):
    Image.new("RGB", (4, 4), GREEN).save(model.folder / "images/t.png")
    (model.folder / "images/link.png").symlink_to(model.folder / "images/t.png")
    (tmp_path / "alias").symlink_to(model.folder)                                  # data on another disk, say
    textured(model, "../images/link.png")
    assert colours(load_obj(tmp_path / "alias/models/model_normalized.obj")) == [GREEN, GREEN]


def test_uvs_far_outside_repeat(model):
    from shapes.rasterizer import surface_colour
    pixels = np.uint8([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [9, 9, 9]]])
    Image.fromarray(pixels).save(model.folder / "images/t.png")
    mesh = model("v 0 0 0\nv 1 0 0\nv 0 1 0\nvt -7.75 12.75\nvt -7.25 12.25\nvt 0 1\n"
                 "mtllib m.mtl\nusemtl a\nf 1/1 2/2 3/3\n",
                 "newmtl a\nmap_Kd ../images/t.png\n")
    corners = surface_colour(mesh, torch.zeros(3, dtype=torch.long), torch.eye(3, dtype=torch.float64)) * 255
    assert corners.round().tolist() == [[250, 0, 0], [9, 9, 9], [250, 0, 0]]


def test_bad_faces_are_dropped_and_counted(model):
    mesh = model(SQUARE + "v nan 0 0\nv 0 inf 0\nv 1 2\nf 1 2 3\nf 1 2 99\nf 0 1 2\nf -9 1 2\n"
                 "f 1/9 2/1 3/1\nf 1 1 2\nf 1 2\nf\nf a b c\n"
                 "f 1 2 3 99\nf 1 2 5\nf 1 2 6\nf 1 2 7\nf 99999999999999999999999 1 2\nf 1 2 2 3\n")
    assert mesh.faces.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert mesh.notes == ["8 faces dropped, with an index out of range",
                          "2 faces dropped, with fewer than 3 distinct corners",
                          "3 faces dropped, with a vertex that is not finite"]


def test_an_index_may_point_further_down(model):
    assert model("f 1/1 2/2 3/3\n" + SQUARE).faces.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("obj, why", [
    ("", "not an OBJ file"),
    ("hello world\nthis is a letter\n", "not an OBJ file"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not an OBJ file"),
    ("v 0 0 0\nv 1 0 0\n", "no face that can be used"),
    ("f 1 2 3\n", "no face that can be used"),
    (SQUARE + "f 1 1 1\n", "1 faces dropped, with fewer than 3 distinct corners")])
def test_what_is_no_model_is_one_sentence_that_names_the_file(model, obj, why):
    with pytest.raises(UserError) as error:
        model(obj)
    said = str(error.value)
    assert why in said and "model_normalized.obj" in said and "\n" not in said


def test_too_large(model, monkeypatch):
    monkeypatch.setattr(meshes, "MAX_FACES", 3)
    with pytest.raises(UserError, match="model_normalized.obj has more than 3 triangles"):
        model(SQUARE + "f 1 2 3 4\n" * 4)
    monkeypatch.setattr(meshes, "MAX_BYTES", 10)
    with pytest.raises(UserError, match="model_normalized.obj is larger than"):
        model(SQUARE + "f 1 2 3 4\n")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="gone.obj is not there"):
        load_obj(tmp_path / "gone.obj")
    with pytest.raises(UserError, match="is not a file"):
        load_obj(tmp_path)


def test_a_symbolic_link_that_leads_to_itself(tmp_path):
    (tmp_path / "a.obj").symlink_to(tmp_path / "a.obj")
    with pytest.raises(UserError, match="a.obj is not there"):
        load_obj(tmp_path / "a.obj")


def test_large_and_hostile_text_takes_bounded_time(model):
    began = time.monotonic()
    Image.new("RGB", (2048, 2048), GREEN).save(model.folder / "images/t.png")
    many = range(200)
    libraries = "mtllib m.mtl\n" * 2000 + "mtllib gone{}.mtl\n" * 500
    mesh = model(SQUARE + "g " + "abc \\\n" * 200_000 + "\n" + libraries
                 + "usemtl " + "x" * 100_000 + "\nf 1 2 3\n"
                 + "".join(f"usemtl a{k}\nf 1/1 2/2 3/3\n" for k in many),
                 "".join(f"newmtl a{k}\nmap_Kd ../images/t.png\n" for k in many))
    assert len(mesh.texels) < 400_000 and len(mesh.notes) <= 21 and max(map(len, mesh.notes)) < 200
    with pytest.raises(UserError, match="triangles"):
        model(SQUARE + "f" + " 1" * (meshes.MAX_FACES + 9))
    assert time.monotonic() - began < 20


def test_16_bit_grey_textures(model):
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(model.folder / "images/t.png")
    assert colours(textured(model, "../images/t.png")) == [(128,) * 3] * 2


def test_version_1_keeps_all_in_one_folder(tmp_path):
    (tmp_path / "a/images").mkdir(parents=True)
    Image.new("RGB", (4, 4), GREEN).save(tmp_path / "a/images/t.png")
    (tmp_path / "a/model.obj").write_text("mtllib ./model.mtl\n" + SQUARE + "usemtl a\nf 1/1 2/2 3/3\n")
    (tmp_path / "a/model.mtl").write_text("newmtl a\nmap_Kd ./images/t.png\n")
    assert colours(load_obj(tmp_path / "a/model.obj")) == [GREEN]


# ---- what a mesh may cost ----

def test_more_vertices_than_a_model_has(tmp_path, monkeypatch):
    monkeypatch.setattr(meshes, "MAX_POINTS", 50)
    for line in ("v 0 0 0\n", "vt 0 0\n"):
        (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n" + line * 60)
        with pytest.raises(UserError, match="more than 50 vertices"):
            load_obj(tmp_path / "a.obj")


def test_many_material_lines_beside_many_files_are_looked_up_once(tmp_path, monkeypatch):
    for k in range(200):
        (tmp_path / f"f{k}").write_text("")
    lines = "".join(f"mtllib missing{k} other{k}\n" for k in range(1000))
    (tmp_path / "a.obj").write_text(lines + "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    looked, real = [], type(tmp_path).iterdir
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda self: (looked.append(self), real(self))[1])
    notes = load_obj(tmp_path / "a.obj").notes
    assert len(looked) <= 4 and notes[0] == "1000 material files: only the first 100 are looked for"


def test_textures_stop_at_what_memory_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(meshes, "MAX_TEXELS", 150)
    for k in range(4):
        Image.new("RGB", (10, 10), (9, 9, 9)).save(tmp_path / f"t{k}.png")
    (tmp_path / "a.mtl").write_text("".join(f"newmtl m{k}\nKd 1 0 0\nmap_Kd t{k}.png\n" for k in range(4)))
    (tmp_path / "a.obj").write_text("mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\n"
                                    + "".join(f"usemtl m{k}\nf 1/1 2/2 3/3\n" for k in range(4)))
    mesh = load_obj(tmp_path / "a.obj")
    assert "more textures than fit into 200 MB: their Kd instead (2 times)" in mesh.notes
    assert mesh.textured[mesh.material].tolist() == [True, True, False, False]
    # Decoding takes time, even of those that are made small afterwards
    monkeypatch.setattr(meshes, "MAX_TEXELS", 10 ** 6)
    monkeypatch.setattr(meshes, "MAX_DECODED", 350)
    mesh = load_obj(tmp_path / "a.obj")
    assert "texture 't3.png' is 10 x 10: with the others more than is decoded, its Kd instead" in mesh.notes
    assert mesh.textured[mesh.material].tolist() == [True, True, True, False]


def test_material_files_stop_at_what_the_limits_promise(tmp_path, monkeypatch):
    monkeypatch.setattr(meshes, "MAX_LIBRARIES", 3)
    monkeypatch.setattr(meshes, "MAX_LIBRARY", 100)
    for k in range(9):
        (tmp_path / f"{k}.mtl").write_text(f"newmtl m{k}\nKd 1 0 0\n" + "#" * 200 * (k == 1))
    (tmp_path / "a.obj").write_text("mtllib 0.mtl 1.mtl 2.mtl\nmtllib 3.mtl 4.mtl 5.mtl\n" + SQUARE
                                    + "".join(f"usemtl m{k}\nf 1 2 3\n" for k in range(6)))
    read, real = [], meshes.read_mtl
    once = lambda path, notes: (read.append(path.name), real(path, notes))[1]
    monkeypatch.setattr(meshes, "read_mtl", once)
    mesh = load_obj(tmp_path / "a.obj")
    assert read == ["0.mtl", "1.mtl", "2.mtl"] and any("1.mtl is larger than" in note for note in mesh.notes)
    assert colours(mesh)[:4] == [RED, (128,) * 3, RED, (128,) * 3]
