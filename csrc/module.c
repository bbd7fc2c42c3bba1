// deepseek_opt._C 的 PyInit：空模块。加载它就注册 torch.ops.deepseek_opt.*（见 binding.cpp）。
#include <Python.h>

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_C",
    .m_doc = "deepseek_opt 的 CPU 算子库；算子在 torch.ops.deepseek_opt。",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
