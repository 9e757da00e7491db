// dreamkernels._C: what is not an operator. No torch headers, so it builds in seconds and works with any torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>

#include "build_information.h"
#include "packing.h"
#include "resize.h"

namespace py = pybind11;

namespace {

using Lengths = py::array_t<int64_t, py::array::c_style>;

py::tuple pack_sequences(const Lengths& lengths, int64_t budget, int64_t look_ahead) {
  if (lengths.ndim() != 1) throw py::value_error("lengths must be one-dimensional, not " + std::to_string(lengths.ndim()) + "-d");
  if (budget < 1) throw py::value_error("budget must be at least 1 token, not " + std::to_string(budget));
  if (look_ahead < 1) throw py::value_error("look_ahead must be at least 1 sequence, not " + std::to_string(look_ahead));
  const int64_t count = lengths.shape(0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = lengths.data()[i];
    if (length < 0) throw py::value_error("sequence " + std::to_string(i) + " has length " + std::to_string(length));
    if (length > budget) {
      throw py::value_error("sequence " + std::to_string(i) + " has " + std::to_string(length) + " tokens, more than the budget of " +
                            std::to_string(budget) + "; raise the budget or shorten the sequence");
    }
  }
  Lengths bin_of(count);
  int64_t bins = 0;
  {
    const int64_t* from = lengths.data();
    int64_t* to = bin_of.mutable_data();
    py::gil_scoped_release release;
    bins = dreamkernels::pack_sequences(from, count, budget, look_ahead, to);
  }
  return py::make_tuple(bin_of, bins);
}

using Bytes = py::array_t<uint8_t, py::array::c_style>;

void resize_crop(const Bytes& picture, std::pair<int64_t, int64_t> size, std::array<int64_t, 4> window, bool bicubic,
                 bool down_first, Bytes& to, int most_level) {
  const auto [columns, rows] = size;
  const auto [left, top, width, height] = window;
  if (picture.ndim() != 3 || picture.shape(2) != 3 || picture.size() == 0) throw py::value_error("picture must be bytes [H, W, 3]");
  if (columns < 1 || rows < 1) throw py::value_error("size must be at least 1 x 1");
  if (left < 0 || top < 0 || width < 1 || height < 1 || left + width > columns || top + height > rows) {
    throw py::value_error("the window must lie inside the resized picture");
  }
  if (to.ndim() != 3 || to.shape(0) != height || to.shape(1) != width || to.shape(2) != 3) {
    throw py::value_error("out must have the shape of the window");
  }
  const uint8_t* from = picture.data();
  uint8_t* into = to.mutable_data();
  const auto filter = bicubic ? dreamkernels::Filter::bicubic : dreamkernels::Filter::bilinear;
  py::gil_scoped_release release;
  dreamkernels::resize_crop(from, picture.shape(0), picture.shape(1), columns, rows, {left, top, width, height}, filter, down_first,
                            into, static_cast<dreamkernels::Level>(most_level));
}

py::dict build_information() {
  py::dict information;
  for (const auto& [key, value] : kBuildInformation) information[key] = value;
  return information;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What is no operator; use dreamkernels.build_information, dreamkernels.packing and dreamkernels.pictures.";
  m.def("build_information", &build_information);
  m.def("pack_sequences", &pack_sequences, py::arg("lengths"), py::arg("budget"), py::arg("look_ahead"));
  m.def("resize_crop", &resize_crop, py::arg("picture"), py::arg("size"), py::arg("window"), py::arg("bicubic"), py::arg("down_first"),
        py::arg("out").noconvert(), py::arg("most_level") = static_cast<int>(dreamkernels::Level::avx512));
}
