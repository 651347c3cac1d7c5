# SQLite's own tests in modes that its suite does not have: `testfixture modes.tcl MODE FILE... --testdir=DIRECTORY`
# runs test files, `testfixture modes.tcl list` prints the names of those of "veryquick". SUITE: the folder `test`.
#
# A mode is a permutation of the suite: SQL that every new connection runs first.

set words $argv
set suite $::env(SUITE)
set argv [lsearch -all -inline -glob $words --*]
set argv0 $suite/modes.test  ;# the suite finds its files beside it, and permutations.test runs none by itself
source $suite/permutations.test

# What a test file is changed by, natively as well. Tests copy and delete `test.db*`: a mount also has `test.db-pos` there,
# a file for reading only that is no part of it. And it has no folders: some tests make one in passing.
set hide_positions {
  rename glob glob_all
  proc glob {args} { lsearch -all -inline -not -glob [uplevel 1 [list glob_all {*}$args]] *-pos }
}
array set without_folders {
  lock.test   {{file mkdir tempdir/t1/t2} {} {./tempdir/../tempdir/t1/.//t2/../../..//test.db} ./test.db}
  lock3.test  {{file mkdir tempdir/t1/t2/t3} {} {./tempdir/t1//t2/./t3//./../..//./../../tempdir/..//test.db//} ./test.db}
  misc1.test  {{file mkdir tempdir} {} {cd tempdir} {} {cd ..} {} {forcedelete tempdir} {}}
  pager1.test {{set nDir [expr $nPadding / 32]} {set nDir 0}}
}
rename slave_test_script slave_test_script_as_is
proc slave_test_script {script} {
  set file [lindex $script 1]
  if {[info exists ::without_folders([file tail $file])]} {
    set channel [open $file]
    set script [string map $::without_folders([file tail $file]) [read $channel]]
    close $channel
  }
  slave_test_script_as_is "$::hide_positions\n$script"
}

proc mode {name sql} {
  array set spec $::testspec(veryquick)
  test_suite $name -prefix "" -description $sql -presql $sql -files $spec(-files)
}
foreach journal {wal truncate persist memory} { mode $journal "pragma journal_mode=$journal" }
foreach size {512 4096 8192 65536} { mode page$size "pragma page_size=$size" }
foreach size {4096 65536} { mode wal-page$size "pragma page_size=$size; pragma journal_mode=wal" }
mode exclusive "pragma locking_mode=exclusive"
mode mmap "pragma mmap_size=268435456"

set name [lindex $words 0]
if {$name eq "list"} {
  array set spec $::testspec(veryquick)
  foreach file [lsort $spec(-files)] { puts_original [file tail $file] }
  exit 0
}
set files [lrange [lsearch -all -inline -not -glob $words --*] 1 end]
set paths {}
foreach file $::alltests { if {[lsearch -exact $files [file tail $file]]>=0} { lappend paths $file } }
array set spec $::testspec($name)
set spec(-files) $paths
run_tests $name {*}[array get spec]
finish_test
