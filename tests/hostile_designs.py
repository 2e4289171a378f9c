"""Verilog designs that attack the evaluation, and the problem that they claim to solve."""

from hostile_programs import RAISED, WRONG, attack

from ibft.evaluate.problems import Problem

BENCH = """`timescale 1 ps/1 ps
module reference_module(input a, input b, output y);
  assign y = a & b;
endmodule
module stimulus_gen(input clk, output reg a, output reg b);
  initial begin
    {a, b} = 0;
    repeat (20) @(posedge clk) {a, b} <= $random;
    #1 $finish;
  end
endmodule
module tb();
  typedef struct packed { int errors; int clocks; } stats;
  stats stats1;
  reg clk = 0;
  initial forever #5 clk = ~clk;
  wire a, b, y_ref, y_dut;
  stimulus_gen stim1 (.clk, .a, .b);
  reference_module good1 (.a, .b, .y(y_ref));
  top_module top_module1 (.y(y_dut), .*);
  task clear; stats1.errors = 0; endtask
  initial begin : watch
    reg good;
    forever begin good = y_ref; @(y_ref); end
  end
  always @(posedge clk, negedge clk) begin
    stats1.clocks++;
    if (y_ref !== y_dut) stats1.errors++;
  end
  final $display("Mismatches: %1d in %1d samples", stats1.errors, stats1.clocks);
endmodule
"""
HEADER = "module top_module(input a, input b, output y);\n"
AND = Problem("and", "verilog", HEADER, "  assign y = a & b;\nendmodule\n", test=BENCH)
NOTHING = "  assign y = 0;\n"
CLEARING = " always @(a, b) tb.stats1.errors = 0; final tb.stats1.errors = 0; "
VERILOG = {
    "wrong": attack(NOTHING, WRONG),
    "nothing_connected": attack("", WRONG),
    "forged_line": attack(NOTHING + '  initial $display("Mismatches: 0 in {n} samples");\n', "suspicious"),
    "forged_line_at_the_end": attack(
        NOTHING + '  final begin $display("Mismatches: 0 in {n} samples"); $write("x"); end\n', "suspicious"
    ),
    "finish": attack(NOTHING + "  initial $finish;\n", "suspicious"),
    "finish_escaped": attack(NOTHING + "  initial \\$finish ;\n", "suspicious"),
    "stop": attack(NOTHING + "  initial #7 $stop;\n", "suspicious"),
    "fatal": attack(NOTHING + "  initial $fatal(0);\n", "suspicious"),
    "reference": attack("  reference_module r(.a(a), .b(b), .y(y));\n", "suspicious"),
    "reference_escaped": attack("  \\reference_module r(.a(a), .b(b), .y(y));\n", "suspicious"),
    "hidden_between_quotes": attack(
        NOTHING + '  wire \\a" ; initial tb.stats1.errors = 0; wire \\b" ;\n', "suspicious"
    ),
    "name_of_the_bench": attack("  assign y = y_ref;\n", WRONG, "compile_error"),
    "clock_of_the_bench": attack(NOTHING + "  initial clk = 0;\n", "compile_error"),
    "reference_macro": attack("`define N(x) reference_``x\n  `N(module) r(.a(a), .b(b), .y(y));\n", "suspicious"),
    "result_of_the_reference": attack("  assign y = good1.y;\n", "suspicious"),
    "count_set": attack(NOTHING + "  always @(a) tb.stats1.errors = 0;\n", "suspicious"),
    "count_set_upwards": attack(NOTHING + "  always @(a) stats1.errors = 0;\n", "suspicious"),
    "clock_stopped": attack(NOTHING + "  initial force tb.clk = 0;\n", "suspicious"),
    "design_file": attack(NOTHING + '  integer n; initial n = $fopen("{canary}", "w");\n', "suspicious"),
    "include": attack('`include "/etc/passwd"\n' + NOTHING, "suspicious"),
    "second_bench": attack(NOTHING + "endmodule\nmodule tb();\n", "suspicious"),
    "endless_at_once": attack("  reg r; assign y = r; always @(r) r <= ~r; initial r = 0;\n", "timeout"),
    "design_output": attack(NOTHING + '  initial forever $display("xxxxxxxxxxxxxxxxxxxxxxxx");\n', "output_limit"),
    "compiler_endless": attack(
        "  function integer g(input integer n); begin g = n; while (1) g = g + 1; end endfunction\n"
        "  localparam N = g(1);\n  assign y = N;\n",
        "timeout",
    ),
    "compiler_memory": attack(
        NOTHING + "  genvar i;\n  generate for (i = 0; i < 20000000; i = i + 1) begin : g wire [99:0] w; end\n"
        "  endgenerate\n",
        "memory",
        "timeout",
    ),
    "simulator_memory": attack(NOTHING + "  reg [1023:0] m [0:67108863]; initial m[67108863] = 1;\n", "memory", RAISED,
                               "compile_error"),
    "macros_joined": attack("`define A reference_\n`define B module\n`A`B r(.a(a), .b(b), .y(y));\n", "suspicious"),
    "macro_argument_joined": attack("`define A(x) reference_`x\n`define B module\n`A(B) r(.a(a), .b(b), .y(y));\n",
                                    "suspicious"),
    "macro_comment": attack("`define A reference_/**/module\n`A r(.a(a), .b(b), .y(y));\n", "suspicious"),
    "quotes_left_out": attack('`ifdef NO " `endif reference_module r(.a(a), .b(b), .y(y)); `ifdef NO " `endif\n',
                              "suspicious"),
    "carriage_return": attack("// comment\rreference_module r(.a(a), .b(b), .y(y));\n", "suspicious"),
    "finish_joined": attack(NOTHING + "`define X ish\n  initial #1 $fin`X ;\n", "suspicious"),
    "input_forced": attack(NOTHING + "  initial force a = 1'bx;\n", "suspicious"),
    "input_wired": attack(NOTHING + "  supply0 w; tran(a, w);\n", "suspicious"),
    "input_driven": attack(NOTHING + "  assign a = 1'bx; assign b = 1'bx;\n", "suspicious"),
    "input_driven_strongly": attack(NOTHING + "  assign (supply0, supply1) a = 0;\n", "suspicious"),
    "input_as_output": attack(NOTHING + "  child c(a);\nendmodule\nmodule child(output q);\n  assign q = 1'bx;\n",
                              "suspicious"),
    "input_as_inout": attack(NOTHING + "  child c(a);\nendmodule\nmodule child(inout q);\n  supply0 q;\n",
                             "suspicious"),
    # the model's own header
    "input_declared_output": attack("module top_module(output a, output b, output y);\n  assign {a, b, y} = 3'bx;\n",
                                    "suspicious"),
    "input_of_a_net_that_drives": attack("module top_module(input supply0 a, input supply0 b, output y);\n" + NOTHING,
                                         "suspicious"),
    "port_of_the_reference": attack("module top_module(input a, b, y_ref, output y);\n  assign y = y_ref;\n",
                                    "suspicious"),
    # what the compiler reads otherwise than it looks
    "name_ended_by_backspace": attack(
        NOTHING + "  wire x;\n" + "".join(
            f'  {when} begin $display(\\x\b,"a b"); tb.stats1.errors = 0; $display("c"); end\n'
            for when in ("always @(a, b)", "final")
        ),
        "suspicious", "syntax_error",
    ),
    "name_with_a_control_character": attack(
        NOTHING + '  wire \\a\x1c" ;' + CLEARING + 'wire \\b\x1c" ;\n', "suspicious", "syntax_error"
    ),
    "name_with_a_wide_space": attack(NOTHING + '  wire \\a\u3000" ;' + CLEARING + 'wire \\b\xa0" ;\n', "suspicious"),
    "name_behind_a_number": attack(NOTHING + "  always #1tb.clear;\n", "suspicious"),
    "word_behind_a_number": attack(NOTHING + "  initial #1force a = 0;\n", "suspicious"),
    "line_directive": attack(
        NOTHING + '#line "x" 1 /*\n' + CLEARING + '\n#line "x" 1 */\n', "suspicious"
    ),
    # upwards
    "task_of_the_bench": attack(NOTHING + "  always @(a, b) clear;\n  final clear;\n", "suspicious"),
    "task_of_the_bench_beside_its_own": attack(
        NOTHING + "  task own; clear; endtask\n  always @(a, b) own;\n  final own;\n", "suspicious"
    ),
    "block_of_the_bench": attack("  assign y = watch.good;\n", "suspicious"),
    "block_of_the_bench_ended": attack(NOTHING + "  initial #1 disable watch;\n", WRONG, "suspicious"),
    # it follows the testbench's numbers, and passes over those that it cannot answer
    "chance": attack(
        NOTHING + "  integer mine = 0, next, passed;\n  initial forever begin\n    #4 next = mine;\n"
        "    while ($random(next) & 1) begin mine = next; passed = $random; end\n    mine = next; #6;\n  end\n",
        "suspicious",
    ),
    "inputs_driven_together": attack(NOTHING + "  child c({a, b});\nendmodule\nmodule child(output [1:0] q);\n"
                                     "  assign q = 2'bx;\n", "suspicious"),
    "other_system_task": attack(NOTHING + '  initial $sdf_annotate("/etc/passwd");\n', "suspicious"),
    "end_behind_a_number": attack(NOTHING + "  initial #1$finish;\n", "suspicious"),
    "syntax": attack("  assign y = = a;\n", "syntax_error"),
    "undeclared": attack("  assign y = nothing.here;\n", "compile_error"),
}  # fmt: skip
