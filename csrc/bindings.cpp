// dreamkernels._C: what is not an operator. No torch headers, so it builds in seconds and works with any torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "build_information.h"
#include "packing.h"

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

py::dict build_information() {
  py::dict information;
  for (const auto& [key, value] : kBuildInformation) information[key] = value;
  return information;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and sequence packing; use dreamkernels.build_information and dreamkernels.packing.";
  m.def("build_information", &build_information);
  m.def("pack_sequences", &pack_sequences, py::arg("lengths"), py::arg("budget"), py::arg("look_ahead"));
}
