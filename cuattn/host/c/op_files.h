/* The files of arithmetic handlers: executor.c includes this header, and X(alu_int) stands for alu_int.c with its
 * table ops_alu_int. A file uses only those above it. */
#ifndef CUATTN_OP_FILES_H
#define CUATTN_OP_FILES_H

#include "alu_int.c"
#include "alu_bits.c"
#include "predicate.c"
#include "special.c"
#include "alu_float.c"
#include "alu_double.c"
#include "narrow.c"
#include "convert.c"
#include "half.c"

#define OP_FILES_ALU(X) \
  X(alu_int) X(alu_bits) X(predicate) X(special) X(alu_float) X(alu_double) X(convert) X(half)

#endif
