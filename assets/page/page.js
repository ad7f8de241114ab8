'use strict';
const D=JSON.parse(document.getElementById('data').textContent),V=document.getElementById('view'),L=document.getElementById('list'),Q=document.getElementById('query');
const el=(tag,text,cls)=>{const e=document.createElement(tag);if(text!==undefined)e.textContent=text;if(cls)e.className=cls;return e};
const add=(to,...parts)=>{for(const p of parts)to.append(p);return to};
const num=x=>x===null||x===undefined?'–':Math.abs(x)>=100?x.toFixed(0):Number(x).toPrecision(3);
let shown=[],current=null;
function label(f){return f.label||'(no label)'}
function list(){
  const words=Q.value.toLowerCase().split(/\s+/).filter(Boolean),order=document.getElementById('order').value;
  shown=D.features.filter(f=>words.every(w=>(f.id+' '+label(f)+' '+f.classes.join(' ')).toLowerCase().includes(w)));
  const key={max:f=>-f.max,density:f=>-f.density,score:f=>-(f.score||0),id:f=>+f.id,site:f=>f.site===null?99:f.site}[order];
  shown.sort((a,b)=>key(a)-key(b)||a.id-b.id);
  L.replaceChildren(...shown.slice(0,1000).map(f=>{const a=el('a');a.href='#'+f.id;a.dataset.id=f.id;add(a,el('strong',f.id+' '),label(f),el('br'),
    el('small','max '+num(f.max)+' · density '+num(f.density)+(f.site===null?'':' · mostly site '+f.site)+(f.score?' · score '+f.score:'')));return a}));
  document.getElementById('count').textContent=shown.length+' of '+D.features.length+' features';mark();
}
function mark(){for(const a of L.children)a.classList.toggle('on',a.dataset.id===current)}
function bars(values,names){const b=el('div',undefined,'bars'),m=Math.max(...values,1e-12);
  values.forEach((v,i)=>{const d=el('div'),k=el('i');k.style.height=70*v/m+'px';d.title=names[i]+': '+num(v);add(d,k,String(names[i]));b.append(d)});return b}
function context(c){
  const d=el('div',undefined,'context'),near=new Map(c.near),top=Math.max(...near.values(),c.value,1e-9);
  d.append(el('span','strength '+num(c.value)+(c.site===null?'':' · site '+c.site)+(c.weight!==1?' · router '+num(c.weight):'')+' · document '+c.document,'meta'));
  c.tokens.forEach((t,i)=>{const e=el(i===c.at?'b':'span',t),v=near.get(i);
    if(v){e.style.background='rgba(var(--hot),'+Math.max(0.08,0.75*Math.max(0,v)/top)+')';e.title=num(v)}d.append(e)});
  return d}
function chips(pairs){const d=el('div',undefined,'chips');for(const [t,v] of pairs){const s=el('span',JSON.stringify(t).slice(1,-1));s.title=num(v);d.append(s)}return d}
function feature(id){
  const f=D.features.find(x=>x.id===id);if(!f){V.replaceChildren(el('p','No feature '+id));return}
  current=id;V.replaceChildren();
  add(V,el('h2','Feature '+f.id),el('p',label(f)));
  const facts=['max '+num(f.max),'active on '+num(100*f.density)+' % of samples'];
  if(f.category)facts.push(f.category);if(f.score)facts.push('self-rated score '+f.score+'/5');
  for(const k of ['detection','fuzzing'])if(f[k]&&f[k].balanced_accuracy!==null)facts.push(k+' '+num(f[k].balanced_accuracy)+' (n '+f[k].n+')');
  V.append(el('p',facts.join(' · '),'soft'));
  if(f.sites)add(V,el('h3',f.norms?'Decoder norm by site':'Activations by site'),bars(f.sites,D.about.sites));
  if(f.sample.length>1){const lo=Math.min(...f.sample),hi=Math.max(...f.sample),n=8,h=Array(n).fill(0);
    for(const v of f.sample)h[Math.min(n-1,Math.floor(n*(v-lo)/(hi-lo||1)))]++;
    add(V,el('h3','Activation histogram (a uniform sample of '+f.sample.length+')'),bars(h,h.map((_,i)=>num(lo+(hi-lo)*i/n))))}
  if(f.promoted.length)add(V,el('h3','Its decoder direction promotes'),chips(f.promoted),el('h3','and suppresses'),chips(f.suppressed));
  if(f.effect_KL!==undefined&&f.effect_KL!==null)add(V,el('h3','Removing it costs (KL '+num(f.effect_KL)+' nats)'),chips(f.effect));
  V.append(el('h3','Strongest contexts'));f.contexts.forEach(c=>V.append(context(c)));
  const groups=['upper third','middle third','lower third'];
  groups.forEach((g,i)=>{const n=f.others.length,part=f.others.slice(Math.floor(i*n/3),Math.floor((i+1)*n/3));
    if(part.length){V.append(el('h3','A sample of the rest, '+g));part.forEach(c=>V.append(context(c)))}});
  mark();window.scrollTo(0,0)}
function overview(){
  current=null;V.replaceChildren(el('h2',D.about.title));
  V.append(el('p',D.about.line,'soft'));
  if(D.routing){add(V,el('h3','Share of tokens by site'),bars(D.routing.share,D.about.sites),el('h3','Router weight of each token of a sample, by site'));
    const box=el('div',undefined,'scroll'),t=el('table',undefined,'map');
    const head=el('tr');head.append(el('td',''));D.about.sites.forEach(s=>head.append(el('td',s)));t.append(head);
    D.routing.sample.tokens.forEach((w,i)=>{const r=el('tr');r.append(el('td',JSON.stringify(w).slice(1,-1)));
      D.routing.sample.weights[i].forEach((v,j)=>{const c=el('td');c.style.background='rgba(var(--hot),'+v+')';c.title='site '+D.about.sites[j]+': '+num(v);r.append(c)});t.append(r)});
    box.append(t);V.append(box)}
  if(D.evaluation.length){V.append(el('h3','Evaluation'));const box=el('div',undefined,'scroll'),t=el('table'),cols=['L0','NormMSE','FVU','KLDiv','Recovered_mean','Dead'];
    const h=el('tr');h.append(el('th','SAE'));cols.forEach(c=>h.append(el('th',c)));t.append(h);
    for(const e of D.evaluation){const r=el('tr');r.append(el('td',e.title));cols.forEach(c=>r.append(el('td',num(e[c]))));t.append(r)}box.append(t);V.append(box)}
  if(D.picture){const i=el('img');i.alt='Comparison of the evaluated SAEs';i.src=D.picture;V.append(i)}
  V.append(el('p','Choose a feature from the list; the arrow keys or j and k step through it.','soft'));mark()}
function go(){const id=decodeURIComponent(location.hash.slice(1));id?feature(id):overview()}
function step(n){const i=shown.findIndex(f=>f.id===current),f=shown[Math.min(shown.length-1,Math.max(0,i+n))];if(f)location.hash=f.id}
Q.addEventListener('input',list);document.getElementById('order').addEventListener('change',list);window.addEventListener('hashchange',go);
document.addEventListener('keydown',e=>{if(e.target===Q)return;if(e.key==='ArrowRight'||e.key==='j')step(1);if(e.key==='ArrowLeft'||e.key==='k')step(-1)});
document.getElementById('home').addEventListener('click',()=>{location.hash=''});
list();go();
